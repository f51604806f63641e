"""Which request may go where: keys, and the short way to the endpoints that take POST requests."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from baton.frontend.api.errors import ApiError, http_error
from baton.frontend.http_io import BrokenAnswerError, Receive, Scope, Send, header

log = logging.getLogger(__name__)

Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Need no key."""


class Posts:
    """ASGI middleware: answers POST requests to the paths that it has endpoints for."""

    def __init__(self, app: Any, endpoints: dict[str, Endpoint], root_path: str) -> None:
        self._app = app
        self._endpoints = endpoints
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(self._root_path).rstrip("/") if scope["type"] == "http" else ""
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            if scope["method"] != "POST":
                raise http_error(405, f"{scope['method']} is not possible at {path}", {"Allow": "POST"})
            await endpoint(scope, receive, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            pass
        except BrokenAnswerError:
            raise  # the server logs it and closes the connection
        except Exception:
            log.exception("a request to %s failed", path)
            await error_response(internal_error())(scope, receive, send)


class RequireKey:
    """ASGI middleware: a Bearer key on everything that is not open."""

    def __init__(self, app: Any, keys: tuple[str, ...], root_path: str) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["path"].removeprefix(self._root_path) in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
        # Every key is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def error_response(error: ApiError) -> Response:
    """The envelope with its status and headers."""
    return Response(error.encode(), error.status, error.headers, "application/json")


def internal_error() -> ApiError:
    """The server logs the traceback; the client learns only that it was not its fault."""
    return ApiError(500, "internal error; the server's log has the details")
