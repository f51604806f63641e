"""Measure throughput and latency of a running OpenAI-compatible server, with vLLM's option names and result block."""

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.frontend.bench import dataset, report
from baton.frontend.cli import engine_args
from baton.proto.errors import UserError

if TYPE_CHECKING:
    from baton.frontend.bench.client import Client, Server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `baton bench serve`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags; the command line wins")
    _add_server(parser.add_argument_group("server"))
    _add_work(parser.add_argument_group("work"))
    _add_output(parser.add_argument_group("output"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", default="openai", choices=("openai", "vllm", "openai-chat"))
    group.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=engine_args.positive, default=8000)
    group.add_argument("--endpoint", help="default: /v1/completions, or /v1/chat/completions with openai-chat")
    group.add_argument("--model", help="name to ask for; default: the first in /v1/models")
    group.add_argument("--api-key", default="", help="bearer key")


def _add_work(group: argparse._ArgumentGroup) -> None:
    number = engine_args.positive
    group.add_argument("--dataset-name", default="random", choices=("random", "sharegpt"))
    group.add_argument("--dataset-path", metavar="FILE", help="ShareGPT-style JSON")
    group.add_argument("--num-prompts", type=number, default=1000)
    group.add_argument("--random-input-len", type=number, default=1024, help="tokens")
    group.add_argument("--random-output-len", type=number, default=128, help="tokens")
    group.add_argument(
        "--random-range-ratio", type=ratio, default=0.0, help="lengths are uniform in [n (1 - r), n (1 + r)]"
    )
    group.add_argument("--sharegpt-output-len", type=number, help="tokens, instead of the recorded answer's length")
    group.add_argument("--request-rate", type=rate, default=float("inf"), help="per second; inf: all at once")
    group.add_argument("--burstiness", type=rate, default=1.0, help="shape of the gamma arrivals; 1 is Poisson")
    group.add_argument("--max-concurrency", type=number, help="requests under way at most")
    group.add_argument("--ignore-eos", action="store_true", help="generate the full output length")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--num-warmups", type=int, default=1, help="requests before the measurement, one at a time")
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save-result", action="store_true", help="write a JSON file into the working directory")
    group.add_argument("--result-filename", "--output-json", metavar="FILE", help="write the JSON result here")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def ratio(text: str) -> float:
    """From 0 up to, not including, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected 0 <= ratio < 1, got {text}")
    return value


def rate(text: str) -> float:
    """Above 0, and inf is allowed."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Send the work, print the block; 1 when no request succeeded."""
    try:
        from baton.frontend.bench import client
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'baton-serve[bench]'") from error
    path = result_path(args)
    chat = args.backend == "openai-chat"
    server = client.Server(
        base_url=(args.base_url or f"http://{args.host}:{args.port}").rstrip("/"),
        endpoint=args.endpoint or ("/v1/chat/completions" if chat else "/v1/completions"),
        chat=chat,
        api_key=args.api_key,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
    )
    model, results, duration_s = asyncio.run(_measure(args, client.Client, server))
    metrics = report.summarise(results, duration_s)
    print(report.block(metrics), flush=True)
    for reason, count in report.errors(results):
        print(f"{count} failed: {reason}", file=sys.stderr)
    if path:
        _save(path, args, model, metrics, results)
    return 0 if metrics.completed else 1


def result_path(args: argparse.Namespace) -> Path | None:
    """Where the JSON result goes, if anywhere. Raises UserError, before a long run, when it can't be written there."""
    if not (args.save_result or args.result_filename):
        return None
    path = Path(args.result_filename or f"baton-bench-{datetime.now(UTC):%Y%m%d-%H%M%S}.json")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"can't write the result to {path}")
    return path


async def _measure(
    args: argparse.Namespace, connect: "type[Client]", server: "Server"
) -> tuple[str, list[report.Result], float]:
    """The model's name, one result per prompt, the duration."""
    async with connect(server) as client:
        model = args.model or await client.first_model()
        warmups, requests = await _work(args, client, model)
        for request in warmups:
            result = await client.send(model, request)
            if result.error:
                raise UserError(f"the warm-up request failed: {result.error}")
        arrivals = dataset.arrival_times(len(requests), args.request_rate, args.burstiness, args.seed)
        results, duration_s = await client.measure(
            model, requests, arrivals, args.max_concurrency, show_progress=not args.disable_tqdm
        )
        return model, results, duration_s


async def _work(
    args: argparse.Namespace, client: "Client", model: str
) -> tuple[list[dataset.Request], list[dataset.Request]]:
    """Warm-up requests, which are not measured and share no prompt with the others, and the measured ones."""
    count = args.num_warmups + args.num_prompts
    if args.dataset_name == "random":
        work = dataset.random_work(
            count, args.random_input_len, args.random_output_len, args.random_range_ratio, args.seed
        )
        # A chat takes text only; the server's count of its tokens is what is reported then.
        chat = args.backend == "openai-chat"
        requests = [
            dataset.Request(await client.detokenize(model, prompt) if chat else prompt, output_len)
            for prompt, output_len in work
        ]
    else:
        if not args.dataset_path:
            raise UserError("--dataset-name sharegpt needs --dataset-path FILE")
        conversations = dataset.read_sharegpt(Path(args.dataset_path), args.seed)
        requests = await dataset.sharegpt_requests(
            conversations, count, args.sharegpt_output_len, lambda text: client.count_tokens(model, text)
        )
    return requests[: args.num_warmups], requests[args.num_warmups :]


def _save(
    path: Path, args: argparse.Namespace, model: str, metrics: report.Metrics, results: list[report.Result]
) -> None:
    """One JSON object: the figures, and lists with one entry per request."""
    content: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": args.backend,
        "model_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate if args.request_rate < float("inf") else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **asdict(metrics),
        "input_lens": [result.input_tokens for result in results],
        "output_lens": [result.output_tokens for result in results],
        "ttfts": [result.ttft_s for result in results],
        "itls": [result.itl_s for result in results],
        "errors": [result.error for result in results],
    }
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
