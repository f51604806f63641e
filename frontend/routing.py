"""Which request may go where: keys, and the short way to the endpoints that take POST requests."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from baton.frontend.api.errors import ApiError, bad_request, http_error
from baton.frontend.api.messages.errors import encode_error
from baton.frontend.http_io import BrokenAnswerError, Receive, Scope, Send, header
from baton.frontend.rates import Rate
from baton.proto.keys import Keyring, bearer_key, key_name

log = logging.getLogger(__name__)

Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready"})
"""The probes, which need no key."""
MESSAGES = "/v1/messages"
"""Paths with this have Anthropic's errors."""
IGNORED_FIELDS = b"x-baton-ignored-fields"
REFUSALS_PER_S = 200
REFUSALS_AT_ONCE = 100
MAX_WAIT_S = 1.0
"""Bad requests that come faster are answered with so much delay at most."""
MAX_NAMES = 20
MAX_NAME_CHARS = 64


class Posts:
    """ASGI middleware: answers POST requests to the paths that it has endpoints for."""

    def __init__(self, app: Any, endpoints: dict[str, Endpoint], root_path: str) -> None:
        self._app = app
        self._endpoints = endpoints
        self._root_path = root_path
        self._refusals = Rate(REFUSALS_PER_S, REFUSALS_AT_ONCE, MAX_WAIT_S)

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
            if error.status < 500 and error.status != 429:
                await self._refusals.take()
            await error_response(error, scope["path"])(scope, receive, send)
        except ClientDisconnect:
            pass
        except RecursionError:  # what JSON's parser still takes can be too deep for what looks through it
            await error_response(bad_request("the request is nested too deeply"), scope["path"])(scope, receive, send)
        except BrokenAnswerError:
            raise  # the server logs it and closes the connection
        except Exception:
            log.exception("a request to %s failed", path)
            await error_response(internal_error(), scope["path"])(scope, receive, send)


class RequireKey:
    """ASGI middleware: a key on everything that is not open, as a bearer token or in Anthropic's header.

    Its name is in keys.key_name from here on.
    """

    def __init__(self, app: Any, keys: Keyring, root_path: str) -> None:
        self._app = app
        self._keys = keys
        self._root_path = root_path
        self._refusals = Rate(REFUSALS_PER_S, REFUSALS_AT_ONCE, MAX_WAIT_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(self._root_path) not in OPEN_PATHS:
            name = self._keys.name_of(_key(scope))
            if name is None:
                text = "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
                error = ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await self._refusals.take()
                await error_response(error, scope["path"])(scope, receive, send)
                return
            key_name.set(name)
        await self._app(scope, receive, send)


def _key(scope: Scope) -> bytes:
    return bearer_key(header(scope, b"authorization") or b"") or header(scope, b"x-api-key") or b""


def note_ignored(names: list[str], scope: Scope) -> None:
    """Tell log and client which fields of a request meant nothing here."""
    shown = ", ".join(ascii(name[:MAX_NAME_CHARS]) for name in names[:MAX_NAMES])
    shown += f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    state = scope["state"]
    log.warning(
        "warnings: request %s of %s: unknown fields were ignored: %s",
        state["request_id"],
        key_name.get() or "a client",
        shown,
    )
    state["headers"].append((IGNORED_FIELDS, shown.encode()))


def error_response(error: ApiError, path: str = "") -> Response:
    """The envelope of the API at `path`, with its status and headers."""
    body = encode_error(error) if MESSAGES in path else error.encode()
    return Response(body, error.status, error.headers, "application/json")


def internal_error() -> ApiError:
    """The server logs the traceback; the client learns only that it was not its fault."""
    return ApiError(500, "internal error; the server's log has the details")
