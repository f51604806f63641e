"""uvicorn's HTTP/1.1 protocol with bounds on what comes before a request's body, and answers in our envelope.

    connection made ─► head (timed, counted) ─► application: body, answer ─► idle (timed) ─► head …

A request that never reaches the application (a line that is no HTTP, headers too long, too many or too slow) is
answered here, and its connection closed. The application finds in `scope["state"]`:

- `request_id`: the client's X-Request-Id as far as it is harmless, else a new one;
- `headers`: a list of (name, value) that go out with the answer, whoever writes it; the request id is among them.
"""

import asyncio
import logging
import re
import socket
import struct
import uuid
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from baton.frontend.api.errors import ApiError, bad_request
from baton.proto.config import FrontendConfig

REQUEST_ID_HEADERS = (b"x-request-id", b"request-id")
"""Of an answer. Anthropic's clients look for the second."""
MAX_HEADERS = 256
MAX_REQUEST_ID = 128
log = logging.getLogger(__name__)
_errors_only = log.getChild("uvicorn")
_errors_only.setLevel(logging.ERROR)  # uvicorn has a warning for every request that is no HTTP
_BYTES_ACKED = struct.Struct("=120xQ")
"""Of Linux' struct tcp_info: tcpi_bytes_acked. Buffers here and in the kernel shrink in steps of a megabyte."""
_NOT_IN_IDS = re.compile(rb"[^A-Za-z0-9._:/+=@-]")


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        *args: Any,
        max_header_bytes: int,
        head_timeout_s: float,
        keep_alive_s: float,
        stalled_client_s: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = keep_alive_s  # type: ignore[assignment]  # an int, it says; any number will do
        self.logger = _errors_only
        self._max_header_bytes = max_header_bytes
        self._head_timeout_s = head_timeout_s
        self._stalled_client_s = stalled_client_s
        self._head_bytes = 0
        self._refusal: ApiError | None = None
        self._patience: asyncio.TimerHandle | None = None
        """For the head of a request."""
        self._unread: asyncio.TimerHandle | None = None
        """For a client that does not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # what follows a refused request
        # uvicorn would cancel it on any byte, but an empty line, or the body of an answered request, begins no other.
        keep_alive, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        super().data_received(data)
        if keep_alive is None:
            return
        if self._is_idle:
            self.timeout_keep_alive_task = keep_alive
        else:
            keep_alive.cancel()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._patience is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            raise self._refused(ApiError(431, f"the request has more than {MAX_HEADERS} headers"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is before:
            return
        request_id = _request_id(self.headers)
        headers = [*self.cycle.default_headers, *((name, request_id) for name in REQUEST_ID_HEADERS)]
        self.scope["state"] |= {"request_id": request_id.decode(), "headers": headers}
        self.cycle.default_headers = headers

    def send_400_response(self, msg: str) -> None:
        """Called for whatever the parser, or one of the methods above, did not take."""
        self._answer(self._refusal or bad_request("this is not a request of HTTP/1.1"))

    @property
    def _is_idle(self) -> bool:
        """The last request is answered, and no other has begun."""
        return self.cycle.response_complete and self._patience is None and not self.transport.is_closing()

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._max_header_bytes:
            limit = f"{self._max_header_bytes} bytes"
            raise self._refused(ApiError(431, f"request line and headers are longer than {limit}"))

    def _refused(self, error: ApiError) -> ApiError:
        """The parser turns what is raised into an error of its own."""
        self._refusal = error
        return error

    def _expect_head(self) -> None:
        self._patience = self.loop.call_later(self._head_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if self.headers is None:
            self.transport.close()  # nothing was asked: a connection kept in reserve
        elif not self.transport.is_closing():
            self._answer(ApiError(408, f"the headers did not arrive within {self._head_timeout_s:.0f} s"))

    def _watch_reader(self) -> None:
        self._unread = self.loop.call_later(self._stalled_client_s, self._check_reader, self._taken())

    def _check_reader(self, taken: int) -> None:
        """A whole answer lies in the transport's buffer, and a transport that is closed keeps it until it is read."""
        if self._taken() > taken:
            self._watch_reader()
        else:
            log.warning("a client has read nothing for %.0f s: its connection is aborted", self._stalled_client_s)
            self.transport.abort()

    def _taken(self) -> int:
        """A number that grows as the client takes what it is sent."""
        connection = self.transport.get_extra_info("socket")
        if connection is None or connection.family == socket.AF_UNIX:
            return -self.transport.get_write_buffer_size()
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        (acked,) = _BYTES_ACKED.unpack(info)
        return int(acked)

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _answer(self, error: ApiError) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # in the middle of another answer
            return
        body = error.encode()
        head = (
            b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\nconnection: close\r\n\r\n"
        ) % (len(body), _request_id(self.headers or []))
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()


def protocol_factory(config: FrontendConfig) -> Any:
    """What uvicorn.Config takes as `http`."""
    return partial(
        BoundedProtocol,
        max_header_bytes=config.max_header_bytes,
        head_timeout_s=config.head_timeout_s,
        keep_alive_s=config.keep_alive_s,
        stalled_client_s=config.stalled_client_s,
    )


def _request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return _NOT_IN_IDS.sub(b"", given[:MAX_REQUEST_ID]) or uuid.uuid4().hex.encode()
