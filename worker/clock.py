"""The scheduler's clock, as seen from a worker whose own is another one: a decision without sockets.

Each question and answer gives a bound on how far the clocks are apart: the answer was written at some moment of the
round trip. The shortest of the last round trips is believed, in the middle: it is wrong by half of it at most. Clocks
drift apart by some 50 µs a second, so the question is asked again.
"""

from collections import deque

import msgspec

from baton.proto.messages import ClockReply, Ledger

ASK_INTERVAL_S = 1.0
CHECK_INTERVAL_S = 5.0
SAMPLES = 16


class ClusterClock:
    """Times inside the worker are on its own clock, those in messages on the scheduler's."""

    def __init__(self, clock_space: str, same_host: bool) -> None:
        """`same_host`: the clocks are taken to be one until an answer says otherwise."""
        self._clock_space = clock_space
        self._offset: float | None = 0.0 if same_host else None
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)  # (round trip, offset)
        self._ask_at = 0.0

    def next_question(self) -> float:
        """When to ask the scheduler; seldom once the clocks are known to be one, but its silence shall be noticed."""
        return self._ask_at

    def asked(self, now: float) -> None:
        """A question has been sent."""
        self._ask_at = now + ASK_INTERVAL_S

    def take(self, reply: ClockReply, now: float) -> None:
        """An answer."""
        if reply.clock_space == self._clock_space:
            self._offset, self._ask_at = 0.0, now + CHECK_INTERVAL_S
            return
        self._samples.append((now - reply.sent_s, reply.now_at - (reply.sent_s + now) / 2))
        self._offset = min(self._samples)[1]

    def local(self, at: float) -> float:
        """A moment of a message, 0 for none; 0 when it can't be told."""
        return at - self._offset if at and self._offset is not None else 0.0

    def outgoing(self, ledger: Ledger) -> Ledger:
        """As it travels; without its times while they can't be told."""
        if self._offset == 0.0 or not ledger.stages:
            return ledger
        offset = self._offset
        stages = {} if offset is None else {stage: at + offset for stage, at in ledger.stages.items()}
        return msgspec.structs.replace(ledger, stages=stages)
