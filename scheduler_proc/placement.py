"""Which worker gets a leg. Policies see only candidates that can take it, and never an empty list."""

from collections.abc import Callable, Sequence
from typing import Protocol

from baton.scheduler_proc.registry import Worker
from baton.scheduler_proc.stream import Stream


class Policy(Protocol):
    """One instance per scheduler; it may keep state between calls."""

    def prefill(self, candidates: Sequence[Worker], stream: Stream) -> Worker:
        """Where to compute the prompt."""

    def decode(self, candidates: Sequence[Worker], stream: Stream) -> Worker:
        """Where to hand it over."""


class LeastLoaded:
    """Prefill by tokens ahead in the queue; decode by room for the prompt, then by streams, then by free blocks."""

    def prefill(self, candidates: Sequence[Worker], stream: Stream) -> Worker:
        """See Policy."""
        return min(candidates, key=lambda worker: (worker.outstanding_tokens, worker.num_streams))

    def decode(self, candidates: Sequence[Worker], stream: Stream) -> Worker:
        """See Policy."""

        def cost(worker: Worker) -> tuple[bool, int, int]:
            short_of_blocks = worker.free_blocks < worker.blocks_for(stream.num_tokens + 1)
            return short_of_blocks, worker.num_streams, -worker.free_blocks

        return min(candidates, key=cost)


class RoundRobin:
    """Each leg to the next worker by name."""

    def __init__(self) -> None:
        self._last_prefill = ""
        self._last_decode = ""

    def prefill(self, candidates: Sequence[Worker], stream: Stream) -> Worker:
        """See Policy."""
        worker = _after(self._last_prefill, candidates)
        self._last_prefill = worker.name
        return worker

    def decode(self, candidates: Sequence[Worker], stream: Stream) -> Worker:
        """See Policy."""
        worker = _after(self._last_decode, candidates)
        self._last_decode = worker.name
        return worker


def _after(name: str, candidates: Sequence[Worker]) -> Worker:
    return min(candidates, key=lambda worker: (worker.name <= name, worker.name))


POLICIES: dict[str, Callable[[], Policy]] = {"least_loaded": LeastLoaded, "round_robin": RoundRobin}


def make_policy(name: str) -> Policy:
    """Raises ValueError for a name that is not in POLICIES."""
    if name not in POLICIES:
        raise ValueError(f"unknown placement policy {name!r}; expected one of {', '.join(POLICIES)}")
    return POLICIES[name]()
