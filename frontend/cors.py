"""Which web pages may call the API from a browser (cross-origin resource sharing)."""

from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from baton.frontend.api.errors import bad_request
from baton.frontend.http_io import Receive, Scope, Send
from baton.frontend.http_protocol import REQUEST_ID_HEADERS
from baton.frontend.routing import IGNORED_FIELDS, error_response
from baton.proto.config import CorsConfig

EXPOSED = ("retry-after", *(name.decode() for name in (*REQUEST_ID_HEADERS, IGNORED_FIELDS)))
"""Headers of answers that a page may read."""
MAX_REQUESTED_BYTES = 4096
"""Of the list of headers that a page wants to send, which the answer repeats."""


class _Cors(CORSMiddleware):
    def preflight_response(self, request_headers: Headers) -> Response:
        """As it is there, with refusals in our envelope."""
        if len(request_headers.get("access-control-request-headers", "")) > MAX_REQUESTED_BYTES:
            return error_response(bad_request(f"access-control-request-headers is over {MAX_REQUESTED_BYTES} bytes"))
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        refused = error_response(bad_request(bytes(answer.body).decode()))
        refused.headers["Vary"] = "Origin"
        return refused


def allow_origins(app: Any, config: CorsConfig) -> Any:
    """ASGI middleware around everything, also around what asks for keys: a browser's preflight has none.

    Without allowed origins browsers keep to pages of the server's own origin, of which there are none.
    """
    if not config.allowed_origins:
        return app
    cors = _Cors(
        app,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=EXPOSED,
    )

    async def only_browsers(scope: Scope, receive: Receive, send: Send) -> None:
        by_browser = any(name == b"origin" for name, _ in scope["headers"])
        await (cors if by_browser else app)(scope, receive, send)

    return only_browsers
