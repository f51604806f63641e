"""When a process that died is started again: a decision without processes or clocks."""

FAILED_STARTS = 3
"""So many deaths in a row before being ready, and the cause is not chance."""
LONGEST_DELAY_S = 30.0
MANY_DEATHS = 10
"""More make no difference."""
STABLE_S = 60.0
"""A process that was ready for so long has made up for its earlier deaths."""


class RestartPolicy:
    """The deaths of one process. The first restart is at once, later ones wait 1, 2, 4, … seconds."""

    def __init__(self) -> None:
        self._ready_at: float | None = None
        self._failed_starts = 0
        self._deaths = 0

    def became_ready(self, now: float) -> None:
        """The process can do its work since `now` (seconds of any monotonic clock)."""
        self._ready_at = now
        self._failed_starts = 0

    def died(self, now: float) -> float | None:
        """Seconds to wait before the next start, or None to give up."""
        if self._ready_at is None:
            self._failed_starts += 1
        elif now - self._ready_at >= STABLE_S:
            self._deaths = 0
        self._ready_at = None
        if self._failed_starts >= FAILED_STARTS:
            return None
        delay = 0.0 if self._deaths == 0 else min(2.0 ** (self._deaths - 1), LONGEST_DELAY_S)
        self._deaths = min(self._deaths + 1, MANY_DEATHS)
        return delay
