"""The run directory goes, and takes nothing with it that is not its own."""

import socket
from pathlib import Path

import pytest

from baton.frontend.cli.serve import _check_unix_socket
from baton.frontend.run_dir import RunDir
from baton.proto.errors import UserError


def test_it_is_removed_with_what_is_in_it_and_with_the_users_socket(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        with RunDir(str(path)) as run_dir:
            (run_dir.path / "file").write_text("x")
        assert not run_dir.path.exists()
        assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_refused_and_survives(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    path = {"file": precious / "file", "directory": precious, "link": tmp_path / "link"}[kind]
    if kind == "link":
        path.symlink_to(precious)
    with pytest.raises(UserError, match="not a socket"):
        _check_unix_socket(path)
    with RunDir(str(path)):
        pass
    assert (precious / "file").read_text() == "x"
    assert path.exists()
