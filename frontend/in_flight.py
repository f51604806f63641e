"""The requests that are being answered, so that a server that stops can wait for those that had begun."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send


class InFlight:
    """Of HTTP and gRPC. A request is more than its streams: it is prepared before, and some come in steps."""

    def __init__(self) -> None:
        self._running: set[asyncio.Future[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request is being answered in this block."""
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._running.add(ended)
        try:
            yield
        finally:
            self._running.discard(ended)
            ended.set_result(None)

    def of(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            with self.one():
                await app(scope, receive, send)

        return counted

    async def all_ended(self) -> None:
        """Wait for those that run now. Others that come meanwhile are refused soon enough."""
        if self._running:
            await asyncio.wait(set(self._running))
