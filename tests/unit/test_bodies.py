"""Reading bodies within bounds."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from starlette.requests import ClientDisconnect

from baton.frontend import bodies as module
from baton.frontend.api.errors import ApiError
from baton.frontend.bodies import MAX_VALUES, SHORT_BYTES, Bodies, check_values
from baton.proto.config import FrontendConfig, ModelConfig

CONFIG = FrontendConfig("frontend", ModelConfig("", ("m",)), "", "", max_request_bytes=4 * SHORT_BYTES)


def sender(pieces: Iterable[bytes], *, then: str = "end") -> Callable[[], Awaitable[dict[str, Any]]]:
    """What an ASGI server hands over; then the end of the body, silence, or the end of the connection."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or then != "end"}
        if then == "silence":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    return receive


def read(config: FrontendConfig, receive: Any, **headers: str) -> bytes:
    async def run() -> bytes:
        scope = {"headers": [(name.encode().replace(b"_", b"-"), value.encode()) for name, value in headers.items()]}
        bodies = Bodies(config)
        try:
            async with bodies.of(scope, receive) as body:
                return body
        finally:
            assert bodies._pending == 0

    return asyncio.run(run())


def status(config: FrontendConfig, receive: Any, **headers: str) -> int:
    with pytest.raises(ApiError) as caught:
        read(config, receive, **headers)
    return caught.value.status


@pytest.mark.parametrize("piece", [1000, SHORT_BYTES])
def test_a_body_comes_in_pieces(piece: int) -> None:
    assert read(CONFIG, sender([b"a" * piece, b"", b"b" * piece, b"c"])) == b"a" * piece + b"b" * piece + b"c"


def test_a_body_that_is_too_large_is_read_but_not_kept_before_it_is_refused() -> None:
    pieces = [b"a" * SHORT_BYTES] * 6
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": pieces[taken - 1], "more_body": taken < len(pieces)}

    assert status(CONFIG, receive) == 413
    assert taken == len(pieces)
    taken = 0
    assert status(CONFIG, receive, content_length=str(6 * SHORT_BYTES)) == 413
    assert taken == len(pieces)
    taken = 0
    assert status(CONFIG, receive, content_length=str(6 * SHORT_BYTES), expect="100-continue") == 413
    assert status(CONFIG, receive, content_length=str(10**12)) == 413
    assert taken == 0


def test_a_body_that_does_not_come() -> None:
    impatient = msgspec.structs.replace(CONFIG, body_timeout_s=0.01)
    assert status(impatient, sender([b"a"], then="silence")) == 408
    with pytest.raises(ClientDisconnect):
        read(CONFIG, sender([b"a"], then="disconnect"))


def test_bodies_that_are_together_too_large_are_refused_for_now() -> None:
    busy = msgspec.structs.replace(CONFIG, max_pending_bytes=SHORT_BYTES)
    with pytest.raises(ApiError) as caught:
        read(busy, sender([b"a" * SHORT_BYTES, b"b"]))
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "1")


def test_values_are_counted_before_they_are_parsed() -> None:
    check_values(b'{"prompt":[' + b"1," * (MAX_VALUES - 2) + b"1]}")
    for value in (b"1,", b"[]", b"{}"):
        with pytest.raises(ApiError, match="values"):
            check_values(b"[" + value * MAX_VALUES)


def test_large_bodies_are_parsed_one_after_the_other_with_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOP_SHARE", 0.5)

    async def run() -> None:
        bodies, loop = Bodies(CONFIG), asyncio.get_running_loop()
        spans: list[tuple[float, float]] = []

        async def parse() -> None:
            async with bodies.of({"headers": []}, sender([b"a" * (SHORT_BYTES + 1)])):
                began = loop.time()
                while loop.time() < began + 0.005:
                    pass
                spans.append((began, loop.time()))

        await asyncio.gather(*(parse() for _ in range(3)))
        for (began, ended), (next_began, _) in pairwise(spans):
            assert next_began - ended >= 0.9 * (ended - began)

    asyncio.run(run())
