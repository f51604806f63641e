"""The demo behind scripts/demo: a server in the background, one streamed question, where its time went."""

import argparse
import http.client
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, Self
from urllib.parse import urlsplit

from baton.proto.supervision import die_with_parent

QUESTION = "Why is the sky blue? Explain it in three short sentences."
MAX_TOKENS = 96
STAGES = (("queue", "received", "scheduled"), ("prefill", "scheduled", "sampled"), ("handoff", "sampled", "stepped"))
BAR_WIDTH = 44
STOP_TIMEOUT_S = 30.0


def main() -> int:
    """Exit code: 0 when an answer came."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the answer instead of serving on")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    args = parser.parse_args()
    say("starting a frontend, a scheduler, a prefill worker and a decode worker")
    with Server(args.port) as server:
        try:
            url = server.wait_ready()
            if url is None:
                return server.process.wait() or 1
            ask(url)
            if args.once:
                return 0
            print(usage(url), flush=True)
            return server.process.wait()
        except KeyboardInterrupt:
            return 0


class Server:
    """`baton serve demo` in the background. Its output is shown until it is ready, then only what is not routine."""

    def __init__(self, port: int) -> None:
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "baton.frontend.cli.main", "serve", "demo"),
                *("--prefill", "1", "--decode", "1", "--host", "127.0.0.1", "--port", str(port)),
                # A modest pool: the machine may be small, and the model's whole context still fits.
                *("--kv-cache-memory-bytes", "400M"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then drains the server
            preexec_fn=die_with_parent,
        )
        self._relay = threading.Thread(target=self._show, daemon=True)
        self._relay.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._relay.join()

    def wait_ready(self) -> str | None:
        """The URL in the server's ready line; None when it ended before."""
        return self._ready.get()

    def _show(self) -> None:
        assert self.process.stdout is not None
        ready = False
        for line in self.process.stdout:
            if not ready or " INFO " not in line:
                print(line, end="", flush=True)
            if line.startswith("ready at "):
                ready = True
                self._ready.put(line.split()[2])
        self._ready.put(None)


def ask(url: str) -> None:
    """Stream one chat answer to the terminal, then show where its time went."""
    say(QUESTION, mark="you")
    print("model  ", end="", flush=True)
    ledger: dict[str, Any] = {}
    output_tokens = 0
    for event in stream_chat(url):
        for choice in event.get("choices", []):
            print(choice["delta"].get("content") or "", end="", flush=True)
        output_tokens = (event.get("usage") or {}).get("completion_tokens", output_tokens)
        ledger = event.get("baton_ledger") or ledger
    print("\n")
    print(waterfall(ledger, output_tokens), flush=True)


def stream_chat(url: str) -> Iterator[dict[str, Any]]:
    """The events of one streamed chat completion. Raises RuntimeError when the server answers with an error."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json", "x-baton-ledger": "1"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)
    connection.close()


def waterfall(ledger: dict[str, Any], output_tokens: int) -> str:
    """The stages of a request as bars on one time axis. Stage times are seconds on one clock."""
    at = ledger["stages"]
    start, end = at["received"], at["finished"]
    rows = [*STAGES, ("decode", "stepped", "finished")]
    lines = [bar(name, at[begin] - start, at[until] - start, end - start) for name, begin, until in rows]
    ttft = at["first_token"] - start
    speed = (output_tokens - 1) / (end - at["first_token"])
    lines.append(f"TTFT {ttft * 1000:.1f} ms, {speed:.1f} tokens/s, {output_tokens} tokens in {end - start:.2f} s")
    moved = f"{ledger.get('moved_bytes', 0) / 2**20:.1f} MiB of KV moved by {ledger.get('transport', 'nothing')}"
    took = f"{ledger.get('transfer_s', 0.0) * 1000:.1f} ms"
    lines.append(f"prefill on {ledger['prefill_worker']}, decode on {ledger['decode_worker']}, {moved} in {took}")
    return "\n".join(lines)


def bar(name: str, begin: float, end: float, total: float) -> str:
    """One row; a stage too short to see still gets one cell."""
    first = min(round(begin / total * BAR_WIDTH), BAR_WIDTH - 1)
    length = max(1, min(round(end / total * BAR_WIDTH), BAR_WIDTH) - first)
    cells = " " * first + "█" * length
    return f"  {name:<8} │{cells:<{BAR_WIDTH}}│ {(end - begin) * 1000:9.1f} ms"


def usage(url: str) -> str:
    """How to go on from here."""
    return f"""
Baton keeps serving at {url} until Ctrl-C. Try it:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "demo", "messages": [{{"role": "user", "content": "Tell me a joke."}}]}}'

  from openai import OpenAI      # pip install openai
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.chat.completions.create(model="demo", messages=[{{"role": "user", "content": "Tell me a joke."}}])
  print(answer.choices[0].message.content)
"""


def say(text: str, mark: str = "demo") -> None:
    print(f"{mark:<6} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
