"""The daemon's life, with a program in its place that answers as NVIDIA's does."""

import os
import subprocess
from pathlib import Path

import pytest

from baton.keeper.mps_daemon import MpsDaemon
from baton.proto import mps
from baton.proto.errors import UserError

CONTROL = """#!/bin/sh
pipe=$CUDA_MPS_PIPE_DIRECTORY/control
if [ "$1" = -f ]; then
    echo "GPUs: ${CUDA_VISIBLE_DEVICES-all}" > "$CUDA_MPS_LOG_DIRECTORY/../saw"
    mkfifo "$pipe"
    read -r word < "$pipe"
    exit 0
fi
[ -p "$pipe" ] || exit 1
read -r word server client
echo "$word $server $client" >> "$CUDA_MPS_LOG_DIRECTORY/../asked"
case $word in
    get_server_list) echo 4711 ;;
    quit) echo now > "$pipe" ;;
esac
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / mps.CONTROL
    program.write_text(CONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def test_it_is_there_on_entry_and_gone_on_exit(control: Path, tmp_path: Path) -> None:
    directory = str(tmp_path / "keeper-0.mps")
    with MpsDaemon(directory) as daemon:
        assert mps.ask(directory, "get_server_list") == "4711\n"
        assert daemon._process.poll() is None
    assert daemon._process.returncode == 0


def test_it_serves_all_gpus_since_clients_number_them(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with MpsDaemon(str(tmp_path / "keeper-0.mps")):
        assert (tmp_path / "saw").read_text() == "GPUs: all\n"


def test_a_stuck_client_is_named_to_every_server(control: Path, tmp_path: Path) -> None:
    directory = str(tmp_path / "keeper-0.mps")
    with MpsDaemon(directory):
        mps.end_client(directory, 123)
    assert "terminate_client 4711 123" in (tmp_path / "asked").read_text()


def test_one_that_does_not_come_up_is_a_clear_error(control: Path, tmp_path: Path) -> None:
    control.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match="does not serve here; leave --mps out"), MpsDaemon(str(tmp_path / "mps")):
        pass


def test_one_that_is_not_installed_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="can't be started"), MpsDaemon(str(tmp_path / "mps")):
        pass


def test_no_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("control", mps.ANSWER_S)

    monkeypatch.setattr(subprocess, "run", late)
    assert mps.ask(str(tmp_path), "quit") is None
