"""One worker as its peers see it on the KV plane: a pool with both halves of a transport, here or in a child process.

python kv_side.py KIND FOLDER NAME INCARNATION FINGERPRINT      speaks JSON lines: see Child
"""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from baton.kv_transfer.contract import Pull, PullDone
from baton.kv_transfer.greeting import Greeting, GreetingSource
from baton.kv_transfer.sink import PeerSink
from baton.kv_transfer.transports import open_transports
from baton.proto.layout import Group, KVLayout
from baton.proto.messages import Peer
from baton.worker.kv_pool import HostPool

NUM_BLOCKS = 2100
SHAPE = (2, 3, 2, 16, 8)
GROUP = Group(
    "full", 3, 16, 2 * 3 * 2 * 16 * 8 * 4, ("kv_heads", "layers", "kv", "tokens", "head_dim"), SHAPE, "float32"
)
LAYOUT = KVLayout("model", (GROUP,))
DEADLINE_S = 30.0


def content(incarnation: int) -> torch.Tensor:
    """What the pool of this incarnation holds at first: [NUM_BLOCKS, *SHAPE]."""
    return torch.randn(NUM_BLOCKS, *SHAPE, generator=torch.Generator().manual_seed(incarnation))


class Side:
    """A worker in this process. `pool.tensor` starts with `content(incarnation)`; a kind is 'shm' or 'cuda tcp'."""

    def __init__(self, kind: str, folder: Path, name: str, incarnation: int, layout: KVLayout = LAYOUT) -> None:
        device, _, transport = kind.rpartition(" ")
        self.pool = _open_pool(device, layout)
        transports = open_transports(transport, self.pool, folder)
        if layout.groups == LAYOUT.groups:
            self.pool.tensor.copy_(content(incarnation))
        greeting = Greeting(layout, name, incarnation, NUM_BLOCKS)
        self.source = GreetingSource(folder / f"{name}-{incarnation}.kv", greeting, transports, self.pool.blocks.memfd)
        self.sink = PeerSink(greeting, transports)
        self.peer = Peer(name, incarnation, f"ipc://{name}", self.source.address)

    def start(self, transfer: int, owner: Peer, source: Sequence[int], target: Sequence[int]) -> None:
        self.sink.start(Pull(transfer, owner, tuple(source), tuple(target)))

    def wait(self, count: int = 1) -> list[PullDone]:
        """At least so many pulls that have ended."""
        done: list[PullDone] = []
        while len(done) < count:
            assert select.select([self.sink], [], [], DEADLINE_S)[0], f"{len(done)} of {count} pulls have ended"
            done += self.sink.completed()
        return done

    def pull(self, owner: Peer, source: Sequence[int], target: Sequence[int]) -> PullDone:
        self.start(1, owner, source, target)
        (done,) = self.wait()
        return done

    def blocks(self) -> torch.Tensor:
        """The pool's content, on the host."""
        return self.pool.tensor.cpu().clone()

    def close(self) -> None:
        self.sink.close()
        self.source.close()
        self.pool.close()


def _open_pool(device: str, layout: KVLayout) -> Any:
    if device != "cuda":
        return HostPool(layout, NUM_BLOCKS)
    from baton.worker.cuda.memory import GpuPool, open_gpu

    return GpuPool(layout, NUM_BLOCKS, open_gpu(0))


class Child:
    """A Side in a process of its own, which can be killed."""

    def __init__(self, kind: str, folder: Path, name: str, incarnation: int, fingerprint: str = "model") -> None:
        command = [sys.executable, __file__, kind, str(folder), name, str(incarnation), fingerprint]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.peer = msgspec.convert(self._read(), Peer)

    def fill(self, block: int, value: float) -> None:
        """Overwrite a block; returns when that is done."""
        self._write({"fill": block, "value": value})
        self._read()

    def start(self, pulls: Sequence[Pull]) -> None:
        """Let it pull; `done` reads what has ended."""
        self._write({"pulls": msgspec.to_builtins(pulls)})

    def done(self) -> PullDone:
        """The next pull of its that ends."""
        return msgspec.convert(self._read(), PullDone)

    def blocks(self) -> torch.Tensor:
        """Its pool's content."""
        self._write({"blocks": True})
        return torch.from_numpy(np.load(self._read()))

    def kill(self) -> None:
        """With SIGKILL."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """In order, unless it was killed."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(DEADLINE_S)

    def _write(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """Serve one Child until its input ends."""
    kind, folder, name, incarnation, fingerprint = sys.argv[1:]
    side = Side(kind, Path(folder), name, int(incarnation), KVLayout(fingerprint, LAYOUT.groups))
    _say(side.peer)
    while True:
        ready, _, _ = select.select([sys.stdin, side.sink], [], [])
        if side.sink in ready:
            for done in side.sink.completed():
                _say(done)
        if sys.stdin not in ready:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        command = json.loads(line)
        if "fill" in command:
            side.pool.tensor[command["fill"]] = command["value"]
            side.blocks()  # on a GPU: wait for it
            _say(True)
        elif "blocks" in command:
            file = Path(folder) / f"{name}.npy"
            np.save(file, side.blocks().numpy())
            _say(str(file))
        else:
            for pull in msgspec.convert(command["pulls"], list[Pull]):
                side.sink.start(pull)
    side.close()


def _say(value: Any) -> None:
    print(json.dumps(msgspec.to_builtins(value)), flush=True)


if __name__ == "__main__":
    main()
