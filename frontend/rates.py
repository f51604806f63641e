"""How often something may happen, so that a flood of it leaves running streams their share of the machine."""

import asyncio
import time


class Rate:
    """Lets `per_s` of something pass each second, `burst` of it at once; what comes faster waits its turn.

    Nobody waits longer than `max_wait_s`: beyond that a flood is answered as it comes rather than kept.
    """

    def __init__(self, per_s: float, burst: float, max_wait_s: float) -> None:
        self._per_s = per_s
        self._burst_s = burst / per_s
        self._max_wait_s = max_wait_s
        self._even_at = 0.0
        """When everything that has passed would be allowed without a burst."""

    def wait_s(self, amount: float, now: float) -> float:
        """How long `amount` has to wait that comes at `now`; counts it."""
        begin = max(self._even_at, now - self._burst_s)
        self._even_at = min(begin + amount / self._per_s, now + self._max_wait_s)
        return max(self._even_at - now, 0.0)

    async def take(self, amount: float = 1.0) -> None:
        """Wait until `amount` may pass."""
        if wait_s := self.wait_s(amount, time.monotonic()):
            await asyncio.sleep(wait_s)
