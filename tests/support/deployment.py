"""Deployments under test: real processes, started by the command line as a user would."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

DEADLINE_S = 90.0
_METRIC = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Served:
    """A running `baton serve`: its process, its URL, and everything it has printed."""

    def __init__(self, *words: str, launch: Callable[..., list[str]] = lambda *command: list(command)) -> None:
        """`launch` wraps the command, to run it elsewhere."""
        command = launch(sys.executable, "-P", "-m", "baton.frontend.cli.main", *words)
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
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that has just ended, or a zombie
                found[" ".join(child.cmdline()).strip().removeprefix("baton: ")] = child.pid
        return found

    def run_dir(self) -> Path:
        """The deployment's private directory."""
        janitor = next(title for title in self.pids() if "baton-janitor" in title)
        return Path(janitor.split("baton-janitor ")[1].split()[0])

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def wait(self) -> int:
        """Until the launcher has ended and every process that wrote to its output too; the exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def close(self) -> None:
        """End it in order; nothing may be left behind, whatever the test did."""
        if self.process.poll() is None:
            self.terminate()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Deployment(Served):
    """`baton serve` of the demo model, with what tests ask of it over HTTP. Use it in a `with` block."""

    def __init__(self, *flags: str, model: str = "demo") -> None:
        super().__init__("serve", model, "--host", "127.0.0.1", "--port", "0", *flags)

    def __enter__(self) -> Self:
        try:
            self.client = httpx.Client(base_url=self.url, timeout=300.0)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        pids = list(self.pids().values()) if self.process.poll() is None else []
        self.close()
        if exc[0] is not None:
            print("\n".join(self.lines))
        assert [pid for pid in pids if psutil.pid_exists(pid)] == [], "processes outlived the launcher"

    def complete(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        """One completion, not streamed."""
        response = self.client.post("/v1/completions", json={"prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def complete_all(self, prompts: list[list[int]], **fields: Any) -> list[dict[str, Any]]:
        """All prompts at once."""
        with ThreadPoolExecutor(max(len(prompts), 1)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, **fields), prompts))

    def metrics(self) -> dict[str, float]:
        """Series, labels included, to value."""
        response = self.client.get("/metrics")
        assert response.status_code == 200, response.text
        return {f"{name}{{{labels}}}": float(value) for name, labels, value in _METRIC.findall(response.text)}

    def total(self, metric: str, label: str = "") -> float:
        """A metric summed over its series, or over those that carry `label`."""
        chosen = (v for series, v in self.metrics().items() if series.startswith(metric + "{") and label in series)
        return sum(chosen)

    def wait_idle(self) -> None:
        """Until no request holds a block or a lease anywhere."""
        deadline = time.monotonic() + DEADLINE_S
        names = ("baton_requests_running", "baton_requests_waiting", "baton_kv_blocks_used", "baton_kv_leases")
        while (left := {name: self.total(name) for name in names}) != dict.fromkeys(names, 0.0):
            assert time.monotonic() < deadline, f"still held after {DEADLINE_S} s: {left}"
