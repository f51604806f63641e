"""Streams whose commands are refused: a cancel may overtake the command that it cancels."""

from baton.proto.messages import Sid


class Tombstones:
    """The lowest attempt still allowed of each cancelled stream, remembered for `remember_s`."""

    def __init__(self, remember_s: float) -> None:
        self._remember_s = remember_s
        self._stones: dict[Sid, tuple[int, float]] = {}  # sid -> (lowest attempt allowed, forget at), oldest first

    def allows(self, sid: Sid, attempt: int) -> bool:
        """Whether this attempt has not been cancelled."""
        allowed, _ = self._stones.get(sid, (0, 0.0))
        return attempt >= allowed

    def bury(self, sid: Sid, attempt: int, now: float) -> None:
        """Refuse this attempt and older ones from now on."""
        allowed, _ = self._stones.pop(sid, (0, 0.0))
        self._stones[sid] = (max(allowed, attempt + 1), now + self._remember_s)

    def sweep(self, now: float) -> None:
        """Forget what is old."""
        while self._stones and self.next_deadline() <= now:
            del self._stones[next(iter(self._stones))]

    def next_deadline(self) -> float:
        """When `sweep` has something to do; infinity when never."""
        return next(iter(self._stones.values()), (0, float("inf")))[1]
