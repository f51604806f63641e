"""`baton bench serve` against a peer that speaks the OpenAI streaming protocol."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

TOKENS = 5


class Peer:
    """Streams TOKENS tokens for every completion, or answers with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.bodies: list[dict] = []
        self.running = 0
        self.most_running = 0

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.completions)
        app.router.add_post("/detokenize", self.detokenize)
        return app

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "peer-model"}]})

    async def detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": "word " * len((await request.json())["tokens"])})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "no room"}}, status=self.status)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "messages" in body
        if chat:
            await self.event(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for index in range(TOKENS):
            piece = {"delta": {"content": "t"}} if chat else {"text": "t"}
            reason = "length" if index == TOKENS - 1 else None
            await self.event(response, {"choices": [{**piece, "finish_reason": reason}]})
        prompt_tokens = len(body.get("prompt", "x" * 7))
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": TOKENS}
        await self.event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response

    async def event(self, response: web.StreamResponse, data: dict) -> None:
        await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")


async def bench(url: str, *flags: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command."""
    command = [sys.executable, "-m", "baton.frontend.cli.main", "bench", "serve", "--base-url", url, *flags]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def with_peer(peer: Peer, use: Callable[[str], Awaitable[None]]) -> None:
    """Run `use(url)` while the peer listens."""

    async def run() -> None:
        runner = web.AppRunner(peer.application())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            await use(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    asyncio.run(run())


def test_random_work_over_completions(tmp_path: Path) -> None:
    peer = Peer()
    result = tmp_path / "result.json"

    async def use(url: str) -> None:
        work = ["--num-prompts", "6", "--random-input-len", "9", "--random-output-len", str(TOKENS), "--ignore-eos"]
        more = ["--save-detailed", "--goodput", "e2el:60000", "--percentile-metrics", "ttft,e2el", "--metadata", "a=b"]
        code, out, err = await bench(url, *work, "--max-concurrency", "2", "--output-json", str(result), *more)
        assert code == 0, err
        assert out.startswith(
            "============ Serving Benchmark Result ============\nSuccessful requests:" + " " * 21 + "6\n"
        )
        assert "6/6" in err
        assert "P99 E2EL (ms):" in out
        assert "ITL" not in out

    with_peer(peer, use)
    warmup, *measured = peer.bodies
    assert len(measured) == 6
    assert all(len(body["prompt"]) == 9 and body["ignore_eos"] and body["model"] == "peer-model" for body in measured)
    assert warmup["prompt"] not in [body["prompt"] for body in measured]
    assert peer.most_running <= 2
    saved = json.loads(result.read_text())
    assert saved["total_input_tokens"] == 54
    assert saved["total_output_tokens"] == 6 * TOKENS
    assert saved["a"] == "b"
    assert saved["request_goodput"] == saved["request_throughput"] > 0
    assert [len(gaps) for gaps in saved["itls"]] == [TOKENS - 1] * 6
    assert all(ttft > 0 for ttft in saved["ttfts"])


def test_chat_backend_counts_tokens_and_not_the_role() -> None:
    peer = Peer()

    async def use(url: str) -> None:
        code, out, _ = await bench(url, "--backend", "openai-chat", "--num-prompts", "2", "--disable-tqdm")
        assert code == 0
        assert f"Total generated tokens:                  {2 * TOKENS}\n" in out

    with_peer(peer, use)
    assert all(body["messages"][0]["content"].startswith("word") for body in peer.bodies)


def test_failed_requests_are_told_and_not_counted() -> None:
    async def use(url: str) -> None:
        code, out, err = await bench(url, "--num-prompts", "3", "--num-warmups", "0", "--disable-tqdm")
        assert code == 1
        assert "Successful requests:                     0\n" in out
        assert "3 failed: HTTP 429" in err

    with_peer(Peer(status=429), use)


def test_a_server_that_is_not_there_is_one_line_and_exit_2() -> None:
    code, out, err = asyncio.run(bench("http://127.0.0.1:9"))
    assert (code, out) == (2, "")
    assert err.startswith("error: no usable answer from http://127.0.0.1:9/v1/models")
    assert len(err.splitlines()) == 1
