"""Requests from bodies: within bounds, in turn, with a word about fields that mean nothing here."""

from typing import Any

from baton.frontend.api.requests import R, parse
from baton.frontend.bodies import Bodies
from baton.frontend.http_io import Receive, Scope
from baton.frontend.routing import note_ignored
from baton.frontend.turns import Turns
from baton.proto.config import FrontendConfig


class RequestReader:
    """Reads all requests of one server."""

    def __init__(self, config: FrontendConfig) -> None:
        self._bodies = Bodies(config)
        self._turns = Turns()

    async def read(self, kind: type[R], scope: Scope, receive: Receive) -> tuple[R, dict[str, Any]]:
        """The request, and its JSON object as it came. Raises ApiError."""
        await self._turns.take()
        async with self._bodies.of(scope, receive) as body:
            wanted, raw, unknown = parse(body, kind)
        if unknown:
            note_ignored(unknown, scope)
        return wanted, raw
