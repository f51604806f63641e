"""The benchmark's own HTTP client, against servers that behave in every way that is allowed, and some that do not."""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable

import pytest

from baton.frontend.bench.client import Client, Server, StreamTimer
from baton.frontend.bench.dataset import Request

OK = b"HTTP/1.1 200 OK\r\n"
EVENTS = [
    b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n',
    b'data: {"choices": [{"text": "b", "finish_reason": "length"}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n',
]


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


WHOLE = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*EVENTS)


def timed(*pieces: bytes) -> StreamTimer:
    """Pieces that arrive one second apart, the first one second after the timer began."""
    timer = StreamTimer()
    for second, piece in enumerate(pieces, 1):
        timer.feed(piece, timer.started + second)
    return timer


def test_a_token_counts_when_the_last_byte_of_its_event_came() -> None:
    data = b"".join(EVENTS)
    result = timed(EVENTS[0][:10], EVENTS[0][10:] + EVENTS[1][:-5], data[len(EVENTS[0] + EVENTS[1]) - 5 :]).result()
    assert (result.ttft_s, result.itl_s, result.latency_s) == (pytest.approx(2), [pytest.approx(1)], pytest.approx(3))
    assert (result.input_tokens, result.output_tokens, result.error) == (3, 2, "")


def test_events_that_arrive_together_have_no_gap() -> None:
    assert timed(b"".join(EVENTS)).result().itl_s == [0.0]


def test_a_role_is_no_token_and_carriage_returns_and_comments_do_not_matter() -> None:
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\r\n\r\n: ping\r\n\r\n'
    text = b'data:{"choices":[{"delta":{"content":"x"}}],"usage":null}\r\n\r\n'
    result = timed(role, text, b"data: [DONE]\r\n\r\n").result()
    assert (result.ttft_s, result.output_tokens, result.error) == (pytest.approx(2), 1, "")


@pytest.mark.parametrize(
    ("choice", "tokens"),
    [
        ('{"text": ""}', 1),
        ('{"delta": {"content": ""}}', 1),
        ('{"delta": {"content": "x"}, "finish_reason": "length"}', 1),
        ('{"text": "", "finish_reason": "stop"}', 0),
        ('{"delta": {}, "finish_reason": "stop"}', 0),
        ('{"delta": {"reasoning": "x"}}', 1),
        ('{"delta": {"reasoning_content": "x", "content": null}}', 1),
        ('{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}', 1),
    ],
)
def test_a_token_without_text_counts_and_an_end_without_text_does_not(choice: str, tokens: int) -> None:
    data = f'data: {{"choices": [{choice}]}}\n\n'.encode()
    result = timed(EVENTS[0], data, b"data: [DONE]\n\n").result()
    assert (result.itl_s, result.output_tokens) == ([pytest.approx(1)] * tokens, 1 + tokens)
    assert result.latency_s == pytest.approx(2)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        (EVENTS[:2], "the stream ended early"),
        ([b"data: [DONE]\n\n"], "the stream had no token"),
        ([EVENTS[0], b'data: {"error": {"message": "no room"}}\n\n'], "in the stream: no room"),
        ([b'data: {"error": "no room"}\n\n'], "in the stream: no room"),
    ],
)
def test_what_was_wrong_with_a_stream(pieces: list[bytes], error: str) -> None:
    assert timed(*pieces).result().error == error


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def send_to(answer: Answer, times: int = 1) -> list[tuple[str, int]]:
    """(error, output tokens) of requests, one after the other, to a server whose connections `answer` handles."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    async def run() -> list[tuple[str, int]]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/root"
            async with Client(Server(url, "/v1/completions", chat=False)) as client:
                results = [await client.send("m", Request([1, 2, 3], 2)) for _ in range(times)]
        return [(result.error, result.output_tokens) for result in results]

    return asyncio.run(run())


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
    return head + await reader.readexactly(length)


def test_a_connection_is_used_again() -> None:
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            for number in itertools.count():
                seen.append((number, await read_request(reader)))
                writer.write(WHOLE)

    assert send_to(answer, 3) == [("", 2)] * 3
    assert [number for number, _ in seen] == [0, 1, 2]
    assert seen[0][1].startswith(b"POST /root/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")


@pytest.mark.parametrize(
    "reply",
    [
        OK + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(b"".join(EVENTS)) + b"".join(EVENTS),
        OK + b"\r\n" + b"".join(EVENTS),
        WHOLE,
    ],
    ids=["length", "until the end", "chunked, closed without a word"],
)
def test_a_server_may_close_after_each_answer(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(reply)

    assert send_to(answer, 3) == [("", 2)] * 3


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", "the server closed the connection without an answer"),
        (WHOLE[:150], "the connection ended in the middle of the answer"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 7\r\n\r\nno room", "HTTP 429: no room"),
        (OK + b"Content-Length: 10\r\n\r\ndata: {no\n", "DecodeError: "),
        (b"nonsense\r\n\r\n", "the answer is no HTTP: "),
    ],
)
def test_a_failure_is_told(reply: bytes, error: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(reply)

    ((told, _),) = send_to(answer)
    assert told.startswith(error), told


def test_nobody_listens() -> None:
    async def run() -> str:
        async with Client(Server("http://127.0.0.1:9", "/v1/completions", chat=False)) as client:
            return (await client.send("m", Request([1], 1))).error

    assert "ConnectionRefusedError" in asyncio.run(run())
