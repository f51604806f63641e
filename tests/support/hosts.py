"""Two hosts on one machine: network namespaces joined by a cable, and for what runs there everything else that differs.

A process on a `Host` sees its own network, its own process ids, its own /dev/shm (where its run directories are, so
that no Unix socket is in reach of the other host), its own host name, and a CLOCK_MONOTONIC of its own.
"""

import itertools
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from support.deployment import DEADLINE_S, Served

PORT = 5555
_BEGIN = 'mount -t tmpfs tmpfs /dev/shm && hostname "$1" && shift && export XDG_RUNTIME_DIR=/dev/shm && exec "$@"'
_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """One side of the cable."""

    name: str
    address: str
    clock_s: int
    """How far its clock is ahead of the machine's."""

    def command(self, *words: str) -> list[str]:
        """What runs `words` there."""
        apart = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--time")
        return [
            *("ip", "netns", "exec", self.name, "unshare", *apart, "--monotonic", str(self.clock_s)),
            *("sh", "-c", _BEGIN, "sh", self.name, *words),
        ]


class Cable:
    """Two Hosts. `missing` says why a machine can't have them."""

    def __init__(self) -> None:
        number = f"{os.getpid() % 10000}-{next(_numbers)}"
        self.hosts = tuple(Host(f"bt{number}{side}", f"10.77.0.{i + 1}", 5000 * i) for i, side in enumerate("ab"))
        for host in self.hosts:
            _ip("netns", "add", host.name)
        near, far = self.hosts
        _ip("link", "add", "cable", "netns", near.name, "type", "veth", "peer", "name", "cable", "netns", far.name)
        for host in self.hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", host.name, "link", "set", device, "up")

    @staticmethod
    def missing() -> str:
        """Why this machine can't be two hosts; empty when it can."""
        try:
            subprocess.run(["ip", "netns", "add", "bt-probe"], check=True, capture_output=True, text=True)
            probe = Host("bt-probe", "", 1).command("true")
            subprocess.run(probe, check=True, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return str(error.stderr).strip()
        finally:
            subprocess.run(["ip", "netns", "del", "bt-probe"], check=False, capture_output=True)
        return ""

    def pull(self, out: bool) -> None:
        """Unplug the cable, or plug it in again."""
        _ip("-n", self.hosts[0].name, "link", "set", "cable", "down" if out else "up")

    def close(self) -> None:
        """The cable goes with its ends."""
        for host in self.hosts:
            _ip("netns", "del", host.name)


class ServedOn(Served):
    """A `baton` command that runs on a Host."""

    def __init__(self, host: Host, *words: str) -> None:
        super().__init__(*words, launch=host.command)

    def baton_pid(self) -> int:
        """The command's own process, inside."""
        (inside,) = psutil.Process(self.process.pid).children()
        return inside.pid

    def terminate(self) -> None:
        """SIGTERM is for the command; what separates it from this machine ends with it."""
        os.kill(self.baton_pid(), signal.SIGTERM)


class Head(ServedOn):
    """`baton serve` of the demo model on a Host, asked over a Unix socket in `folder`. Use it in a `with` block."""

    def __init__(self, host: Host, folder: Path, *flags: str) -> None:
        self._socket = folder / "http"
        super().__init__(host, "serve", "demo", "--uds", str(self._socket), *flags)

    def __enter__(self) -> "Head":
        self.client = httpx.Client(
            base_url="http://head", transport=httpx.HTTPTransport(uds=str(self._socket)), timeout=DEADLINE_S
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.close()

    def complete(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        """One completion with its ledger."""
        headers = {"x-baton-ledger": "1"}
        answer = self.client.post("/v1/completions", json={"prompt": prompt, **fields}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
