"""Sends the work of a benchmark over HTTP and times the streams. Needs the extra `bench`."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
from tqdm import tqdm

from baton.frontend.bench.dataset import Request
from baton.frontend.bench.http import Connections, HttpError
from baton.frontend.bench.report import Result
from baton.proto.errors import UserError

TIMEOUT_S = 6 * 3600.0


@dataclass(frozen=True)
class Server:
    """Whom to ask, and how."""

    base_url: str
    endpoint: str
    chat: bool
    api_key: str = ""
    temperature: float = 0.0
    ignore_eos: bool = False


class Client:
    """Connections to one server; an async context manager."""

    def __init__(self, server: Server) -> None:
        """Raises UserError for what is no URL."""
        self._server = server
        try:
            self._connections = Connections(
                server.base_url, {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connections.close()

    async def first_model(self) -> str:
        """The name of the first served model."""
        models = await self._json("GET", "/v1/models")
        return models["data"][0]["id"]

    async def count_tokens(self, model: str, text: str) -> int:
        """How many tokens the server sees in `text`."""
        return (await self._json("POST", "/tokenize", {"model": model, "prompt": text}))["count"]

    async def detokenize(self, model: str, tokens: list[int]) -> str:
        """The text of `tokens`."""
        return (await self._json("POST", "/detokenize", {"model": model, "tokens": tokens}))["prompt"]

    async def measure(
        self,
        model: str,
        requests: Sequence[Request],
        arrivals: Sequence[float],
        max_concurrency: int | None,
        show_progress: bool,
    ) -> tuple[list[Result], float]:
        """Send each request at its time (seconds from now); results in order, and the seconds until the last ended."""
        slots = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
        started = time.perf_counter()
        with tqdm(total=len(requests), disable=not show_progress, unit="req") as bar:

            async def one(request: Request, at_s: float) -> Result:
                await asyncio.sleep(max(0.0, started + at_s - time.perf_counter()))
                async with slots:
                    result = await self.send(model, request)
                bar.update()
                return result

            results = await asyncio.gather(*map(one, requests, arrivals))
        return results, time.perf_counter() - started

    async def send(self, model: str, request: Request) -> Result:
        """One streamed request; a failure is told in the result."""
        body = msgspec.json.encode(self._body(model, request))
        timer = StreamTimer()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._connections.request("POST", self._server.endpoint, body, timer.feed)
        except HttpError as error:
            return Result(error=str(error))
        except (OSError, msgspec.DecodeError) as error:
            return Result(error=f"{type(error).__name__}: {error}")
        return timer.result()

    def _body(self, model: str, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "temperature": self._server.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._server.ignore_eos:
            body["ignore_eos"] = True
        if self._server.chat:
            message = {"role": "user", "content": request.prompt}
            return {**body, "messages": [message], "max_completion_tokens": request.output_len}
        return {**body, "prompt": request.prompt, "max_tokens": request.output_len}

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = bytearray()
        data = b"" if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._connections.request(method, path, data, lambda piece, _: answer.extend(piece))
            return msgspec.json.decode(answer)
        except (HttpError, OSError, msgspec.DecodeError) as error:
            raise UserError(f"no usable answer from {self._server.base_url}{path}: {error}") from error


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct, gc=False):
    """As much of a chunk as says when which tokens came."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class StreamTimer:
    """Reads one streamed answer and notes when its tokens came."""

    def __init__(self) -> None:
        self._result = Result()
        self.started = self._latest = time.perf_counter()
        self._chunks = 0
        self._ended = False
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        """Bytes of the body that arrived at `now`. Raises msgspec.DecodeError for an event that is no JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def result(self) -> Result:
        """What is known once the answer has ended."""
        result = self._result
        result.output_tokens = result.output_tokens or self._chunks
        if not result.error and not self._ended:
            result.error = "the stream ended early"
        elif not result.error and not self._chunks:
            result.error = "the stream had no token"
        return result

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        event = _decode(data)
        if event.error is not None:
            told = event.error.get("message") if isinstance(event.error, dict) else None
            self._result.error = f"in the stream: {told or event.error}"
        if event.usage is not None:
            self._result.input_tokens = event.usage.prompt_tokens
            self._result.output_tokens = event.usage.completion_tokens
        if event.choices:
            self._result.latency_s = now - self.started
        if not event.choices or not _has_token(event.choices[0], first=self._chunks == 0):
            return
        self._chunks += 1
        if self._chunks == 1:
            self._result.ttft_s = now - self.started
        else:
            self._result.itl_s.append(now - self._latest)
        self._latest = now


def _has_token(choice: _Choice, first: bool) -> bool:
    """Whether a chunk stands for a token, whose text may be empty. A role alone does not, nor does an end without text
    unless nothing came before it."""
    delta = choice.delta or _Delta(content=choice.text)
    written = bool(delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls)
    if written or choice.finish_reason is not None:
        return written or first
    return delta.content is not None and delta.role is None
