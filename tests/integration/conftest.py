"""Real deployments for the integration tests: `baton serve` over a tiny model with random weights."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from baton.worker.weights.resolve import resolve

DEADLINE_S = 90.0
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


class Served:
    """A running `baton serve`: its process, its URL, and everything it has printed."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._printed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._printed:
                self.lines.append(line.rstrip())
                self._printed.notify_all()
        with self._printed:
            self._ended = True
            self._printed.notify_all()

    def wait_for(self, text: str, count: int = 1) -> str:
        """The line that brings the count-th appearance of `text`; fails when the process ends before."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        with self._printed:
            arrived = self._printed.wait_for(lambda: len(found()) >= count or self._ended, DEADLINE_S)
            assert arrived, f"no {text!r} within {DEADLINE_S} s:\n" + "\n".join(self.lines)
            assert len(found()) >= count, f"ended without {text!r}:\n" + "\n".join(self.lines)
            return found()[count - 1]

    @property
    def url(self) -> str:
        """Where it serves, once it is ready."""
        return self.wait_for("ready at ").split()[2]

    def pids(self) -> dict[str, int]:
        """Process title without `baton: ` -> pid, of every child."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {(" ".join(child.cmdline()).strip()).removeprefix("baton: "): child.pid for child in children}

    def run_dir(self) -> Path:
        """The deployment's private directory."""
        janitor = next(title for title in self.pids() if title.startswith("/bin/sh"))
        return Path(janitor.split()[-1])

    def wait(self) -> int:
        """Until the launcher has ended and every process that wrote to its output too; the exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def close(self) -> None:
        """End it in order; nothing may be left behind, whatever the test did."""
        if self.process.poll() is None:
            self.process.terminate()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Callable[..., Served]:
    """Start `baton WORDS…`; ended with the test."""

    def start(*words: str) -> Served:
        served = Served(*words)
        request.addfinalizer(served.close)
        return served

    return start


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for --load-format dummy: the demo model's tokenizer, a two-layer config, no weights."""
    demo = resolve("demo")
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    config = json.loads((demo / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **TINY}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, directory)
    return directory


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A client without a pool to leak."""
    with httpx.Client(timeout=DEADLINE_S) as client:
        yield client
