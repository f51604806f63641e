"""Which blocks a worker owns: all of its own pool, or a share of one that a keeper has."""

import logging
import os
import select
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import msgspec
import numpy as np
import zmq

from baton.proto.channels import LINGER_MS, Dealer, identity
from baton.proto.config import WorkerConfig
from baton.proto.errors import UserError
from baton.proto.messages import (
    Allocate,
    Allocated,
    EndTurn,
    Filled,
    FromKeeper,
    Join,
    Memory,
    Message,
    Note,
    Prompts,
    Share,
    Swap,
    Swapped,
    TakeTurn,
    Turn,
    Withdraw,
)
from baton.proto.network import Network

log = logging.getLogger(__name__)

POOL = "kv"
"""The pool's key among a keeper's memories."""
ASK_AGAIN_S = 1.0
"""A keeper that does not answer the first message may not have been there yet, or may have been another one."""

M = TypeVar("M", bound=Message)


class Blocks:
    """Every block of a pool that no other worker uses."""

    shared_pool = ""
    """As in Peer."""
    sources: tuple[zmq.Socket | int, ...] = ()
    """For a poller: `drain` has something to say."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks

    def join(self, incarnation: int) -> Sequence[int]:
        """What a new incarnation of this worker owns."""
        return range(self._num_blocks)

    def note(self, key: str) -> bytes | None:
        """What an earlier process has found out."""
        return None

    def take_note(self, key: str, data: bytes) -> None:
        """For later processes."""

    def drain(self, ready: Container[object] | None = None) -> list[Swapped | Prompts]:
        """What the keeper has said since the last call; `ready`: as of Dealer.drain, of `sources`."""
        return []

    def send(self, message: Swap | Withdraw | Prompts) -> None:
        """Ask or tell the keeper."""
        raise AssertionError("there is no keeper to ask")

    def close(self) -> None:
        """Nothing to let go of."""


class SharedBlocks(Blocks):
    """A connection to the keeper of a device. Whatever waits for its answer ends with an error when it dies."""

    def __init__(self, config: WorkerConfig) -> None:
        self._worker = config.name
        self._network = Network()  # this host only
        me = identity(config.name, int.from_bytes(os.urandom(7), "big"))
        self._channel: Dealer[FromKeeper] = Dealer(self._network, config.keeper, me, FromKeeper)
        # Blocks that a prefix cache keeps are not given away, and other transports were not asked to.
        self._swaps = not config.cache.enable_prefix_caching and config.kv_transfer in ("auto", "local")
        self._pidfd = -1
        self._death = select.poll()
        self._turn: Turn | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """In here no other worker of the keeper loads or measures."""
        self._turn = self._take_turn()
        self._pidfd = os.pidfd_open(self._turn.pid)
        self._death.register(self._pidfd, select.POLLIN)
        self.sources = (self._channel.socket, self._pidfd)
        self.shared_pool = self._turn.shared_pool if self._swaps else ""
        log.info("KV blocks are %s within the keeper's pool", "swapped" if self._swaps else "copied")
        yield
        self._channel.send(EndTurn())

    def pool(self, block_bytes: int, num_blocks: Callable[[], int]) -> Memory:
        """The pool for all workers; when it has to be made yet it gets `num_blocks`. Raises UserError."""
        known = self._known.memories.get(POOL)
        if known is not None:
            return known
        count = num_blocks()
        return self._allocate(Allocate(POOL, count * block_bytes, count))

    def memory(self, key: str, num_bytes: int) -> Memory:
        """Memory under this key, perhaps not `ready`: then it is to be filled. Raises UserError."""
        return self._known.memories.get(key) or self._allocate(Allocate(key, num_bytes))

    def filled(self, key: str) -> None:
        """The memory holds what it should."""
        self._channel.send(Filled(key))

    def note(self, key: str) -> bytes | None:
        """See Blocks."""
        return self._known.notes.get(key)

    def take_note(self, key: str, data: bytes) -> None:
        """See Blocks."""
        self._channel.send(Note(key, data))

    def join(self, incarnation: int) -> list[int]:
        """See Blocks. What was said to an earlier incarnation and not read is dropped."""
        self._channel.send(Join(incarnation))
        _, (frame,) = self._wait(Share)
        return np.frombuffer(frame, dtype=np.int32).tolist()

    def drain(self, ready: Container[object] | None = None) -> list[Swapped | Prompts]:
        """See Blocks. Raises RuntimeError when the keeper has ended."""
        if ready is None or self._pidfd in ready:
            self._check_alive()
        return [message for message, _ in self._channel.drain(ready) if isinstance(message, Swapped | Prompts)]

    def send(self, message: Swap | Withdraw | Prompts) -> None:
        """See Blocks."""
        self._channel.send(message)

    def close(self) -> None:
        """Let go of the connection, not of what the keeper holds."""
        self._channel.close()
        os.close(self._pidfd)
        self._network.close(LINGER_MS)

    @property
    def _known(self) -> Turn:
        assert self._turn is not None
        return self._turn

    def _take_turn(self) -> Turn:
        while True:
            self._channel.send(TakeTurn(self._worker, os.getpid()))
            if self._channel.socket.poll(int(ASK_AGAIN_S * 1000)):
                for message, _ in self._channel.drain():
                    if isinstance(message, Turn):
                        return message

    def _allocate(self, message: Allocate) -> Memory:
        self._channel.send(message)
        answer, _ = self._wait(Allocated)
        if answer.memory is None:
            raise UserError(f"{answer.error}; lower --num-blocks, --kv-cache-memory-bytes or --gpu-memory-utilization")
        return answer.memory

    def _wait(self, kind: type[M]) -> tuple[M, tuple[bytes | memoryview, ...]]:
        poller = zmq.Poller()
        for source in self.sources:
            poller.register(source, zmq.POLLIN)
        while True:
            for message, frames in self._channel.drain():
                if isinstance(message, kind):
                    return message, frames
            self._check_alive()
            poller.poll()

    def _check_alive(self) -> None:
        if self._death.poll(0):
            raise RuntimeError("the keeper has ended, and its memory with it")


def cost_key(config: WorkerConfig) -> str:
    """Steps cost the same where this is the same, on one device."""
    parts = (config.model, config.batch, config.cache.block_size, config.attention_backend)
    return f"costs/{msgspec.json.encode(parts).decode()}"
