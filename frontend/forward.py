"""Requests that another frontend of the deployment must answer, handed on to it over its own Unix socket.

The kernel gives a connection to any of the frontends, but what one of them remembers is in its memory alone.
"""

import asyncio
from pathlib import Path
from typing import Any

import httptools
from starlette.responses import Response

from baton.frontend.api.errors import ApiError, unavailable
from baton.frontend.http_io import BrokenAnswerError, Receive, Scope, Send, disconnected
from baton.frontend.http_protocol import REQUEST_ID_HEADERS
from baton.frontend.routing import IGNORED_FIELDS

_READ_BYTES = 64 * 2**10
_OF_ONE_HOP = frozenset(
    {b"connection", b"content-length", b"expect", b"host", b"keep-alive", b"te", b"transfer-encoding", b"upgrade"}
)
_OURS = frozenset({b"date", *REQUEST_ID_HEADERS, IGNORED_FIELDS})
"""Headers that this frontend gives answers itself; for web pages too, so that the other one hears of no origin."""
_NOT_HANDED_ON = frozenset({b"origin", b"x-request-id"})


def peer_socket(run_dir: str, name: str) -> Path:
    """Where a frontend listens for its peers."""
    return Path(run_dir) / f"{name}.peer"


class Forward(Response):
    """The answer of the frontend that listens at `peer` to the same request."""

    def __init__(self, peer: Path, body: bytes = b"") -> None:
        """`body`: the request's, which has been read."""
        super().__init__()
        self._peer, self._body = peer, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Piece by piece; ends the other request when the client leaves.

        Raises ApiError when there is no answer, and BrokenAnswerError when it ends in the middle.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._peer))
        except OSError:
            raise unavailable("the frontend that has this response is being started; try again") from None
        gone = asyncio.ensure_future(disconnected(receive))
        gone.add_done_callback(lambda _: writer.close())
        try:
            writer.write(_head(scope, len(self._body)) + self._body)
            answer = _Answer()
            while not answer.complete and (data := await reader.read(_READ_BYTES)):
                answer.parser.feed_data(data)
                for message in answer.taken():
                    await send(message)
            if answer.complete or gone.done():
                return
            if answer.begun:
                raise BrokenAnswerError
            raise ApiError(502, "the frontend that has this response gave no answer")
        finally:
            gone.cancel()
            writer.close()


def _head(scope: Scope, length: int) -> bytes:
    path = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = [pair for pair in scope["headers"] if pair[0] not in _OF_ONE_HOP and pair[0] not in _NOT_HANDED_ON]
    headers += [(b"host", b"peer"), (b"connection", b"close"), (b"content-length", str(length).encode())]
    headers.append((b"x-request-id", scope["state"]["request_id"].encode()))  # both logs have the one the client gets
    lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (scope["method"].encode(), path, lines)


class _Answer:
    """What the parser has found, as ASGI messages."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.begun = False
        self.complete = False
        self._headers: list[tuple[bytes, bytes]] = []
        self._messages: list[dict[str, Any]] = []

    def taken(self) -> list[dict[str, Any]]:
        """Those that have not been taken."""
        messages, self._messages = self._messages, []
        return messages

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if (name := name.lower()) not in _OF_ONE_HOP | _OURS:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.begun = True
        status = self.parser.get_status_code()
        self._messages.append({"type": "http.response.start", "status": status, "headers": self._headers})

    def on_body(self, body: bytes) -> None:
        self._messages.append({"type": "http.response.body", "body": body, "more_body": True})

    def on_message_complete(self) -> None:
        self.complete = True
        self._messages.append({"type": "http.response.body", "body": b"", "more_body": False})
