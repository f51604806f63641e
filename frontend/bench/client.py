"""Sends the work of a benchmark over HTTP and times the streams. Needs the extra `bench`."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import msgspec
from tqdm import tqdm

from baton.frontend.bench.dataset import Request
from baton.frontend.bench.report import Result
from baton.proto.errors import UserError

TIMEOUT_S = 6 * 3600.0
LONGEST_LINE = 2**22


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
        self._server = server
        self._decode = msgspec.json.Decoder().decode
        headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(TIMEOUT_S),
            read_bufsize=LONGEST_LINE,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

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
        result = Result()
        started = time.perf_counter()
        try:
            async with self._session.post(
                self._server.base_url + self._server.endpoint, json=self._body(model, request)
            ) as reply:
                if reply.status != 200:
                    result.error = f"HTTP {reply.status}: {(await reply.text())[:200]}"
                    return result
                await self._time_stream(reply, result, started)
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, msgspec.DecodeError) as error:
            result.error = f"{type(error).__name__}: {error}"
        return result

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

    async def _time_stream(self, reply: aiohttp.ClientResponse, result: Result, started: float) -> None:
        latest = started
        chunks = 0
        ended = False
        async for data in _events(reply):
            now = time.perf_counter()
            if data == b"[DONE]":
                ended = True
                continue
            event = self._decode(data)
            if "error" in event:
                result.error = f"in the stream: {event['error'].get('message', event['error'])}"
                return
            if usage := event.get("usage"):
                result.input_tokens = usage["prompt_tokens"]
                result.output_tokens = usage.get("completion_tokens", 0)
            if not event.get("choices") or not _has_token(event["choices"][0], first=chunks == 0):
                continue
            chunks += 1
            if chunks == 1:
                result.ttft_s = now - started
            else:
                result.itl_s.append(now - latest)
            latest = now
        result.latency_s = latest - started
        result.output_tokens = result.output_tokens or chunks
        if not ended or not chunks:
            result.error = "the stream ended early" if not ended else "the stream had no token"

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            async with self._session.request(method, self._server.base_url + path, json=body) as reply:
                if reply.status != 200:
                    raise UserError(f"{self._server.base_url}{path} answered HTTP {reply.status}: {await reply.text()}")
                return self._decode(await reply.read())
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise UserError(f"no usable answer from {self._server.base_url}{path}: {error}") from error


def _has_token(choice: dict[str, Any], first: bool) -> bool:
    """Whether a chunk brings output. A role alone does not; an end does if nothing came before it."""
    text = choice.get("text") or (choice.get("delta") or {}).get("content")
    return bool(text) or (first and choice.get("finish_reason") is not None)


async def _events(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event."""
    async for line in reply.content:
        if line.startswith(b"data:"):
            yield line[5:].strip()
