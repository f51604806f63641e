"""The HTTP requests that are being answered, so that a server that stops can wait for those that had begun."""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send


class InFlight:
    """ASGI middleware. A request is more than its streams: it is prepared before, and some come in steps."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._running: set[asyncio.Future[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._running.add(ended)
        try:
            await self._app(scope, receive, send)
        finally:
            self._running.discard(ended)
            ended.set_result(None)

    async def all_ended(self) -> None:
        """Wait for those that run now. Others that come meanwhile are refused soon enough."""
        if self._running:
            await asyncio.wait(set(self._running))
