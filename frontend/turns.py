"""New requests share the event loop with running streams: a few in each of its turns, however many arrive at once.

Checking, tokenising and submitting a request takes a fraction of a millisecond. A thousand that arrive together would
be one turn of the loop, for half a second of which no token of a running stream is sent.
"""

import asyncio
from collections import deque

PER_TURN = 4


class Turns:
    """Lets PER_TURN callers of `take` go on in each turn of the loop, in order of arrival."""

    def __init__(self) -> None:
        self._left = PER_TURN
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Wait for a place, in this turn when there is one."""
        loop = asyncio.get_running_loop()
        if self._left == PER_TURN:
            loop.call_soon(self._next)
        if self._left:
            self._left -= 1
            return
        place = loop.create_future()
        self._waiting.append(place)
        await place

    def _next(self) -> None:
        self._left = PER_TURN
        while self._left and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                self._left -= 1
        if self._left < PER_TURN:
            asyncio.get_running_loop().call_soon(self._next)
