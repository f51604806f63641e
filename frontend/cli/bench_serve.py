"""Measure throughput and latency of a running OpenAI-compatible server, with vLLM's option names and result block."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.frontend.bench import dataset, report
from baton.frontend.cli import bench_args, engine_args
from baton.proto.address import bracketed
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
    bench_args.add_dataset(group)
    group.add_argument(
        "--request-rate", type=bench_args.rate, default=float("inf"), help="per second; inf: all at once"
    )
    group.add_argument(
        "--burstiness", type=bench_args.rate, default=1.0, help="shape of the gamma arrivals; 1 is Poisson"
    )
    group.add_argument("--max-concurrency", type=number, help="requests under way at most")
    group.add_argument("--ignore-eos", action="store_true", help="generate the full output length")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--num-warmups", type=int, default=1, help="requests before the measurement, one at a time")
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics",
        type=latency_names,
        default=("ttft", "tpot", "itl"),
        metavar="NAMES",
        help="latencies to print, of ttft,tpot,itl,e2el; default: the first three",
    )
    group.add_argument(
        "--metric-percentiles", type=percentiles, default=(99.0,), metavar="NUMBERS", help="default: 99; or 50,90,99.9"
    )
    group.add_argument(
        "--goodput",
        type=target,
        nargs="+",
        metavar="NAME:MS",
        help="count the requests that meet all of these, for example ttft:300 tpot:30 e2el:2000",
    )
    group.add_argument("--save-result", action="store_true", help="write a JSON file")
    group.add_argument("--save-detailed", action="store_true", help="with the times of every request in it")
    group.add_argument("--append-result", action="store_true", help="one more line in the file, if it exists")
    group.add_argument("--result-dir", metavar="DIR", help="of the JSON file; default: the working directory")
    group.add_argument("--result-filename", metavar="FILE", help="of the JSON file; default: named by date and rate")
    group.add_argument("--output-json", metavar="FILE", help="the same as --save-result --result-filename FILE")
    group.add_argument("--metadata", nargs="+", type=pair, metavar="KEY=VALUE", help="written into the result")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def latency_names(text: str) -> tuple[str, ...]:
    """Names of report.TITLES, separated by commas."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(report.TITLES):
        raise argparse.ArgumentTypeError(f"expected names of {','.join(report.TITLES)}, got {','.join(unknown)!r}")
    return names


def percentiles(text: str) -> tuple[float, ...]:
    """Numbers from 0 to 100, separated by commas."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"expected percentiles such as 50,99, got {text!r}")
    return values


def target(text: str) -> tuple[str, float]:
    """A latency and the most it may be, in milliseconds."""
    name, _, value = text.partition(":")
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = -1.0
    if name not in report.TARGETED or not milliseconds >= 0:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(report.TARGETED)} as in ttft:300, got {text!r}")
    return name, milliseconds


def pair(text: str) -> tuple[str, str]:
    """KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def run(args: argparse.Namespace) -> int:
    """Send the work, print the block; 1 when no request succeeded."""
    import uvloop

    try:
        from baton.frontend.bench import client
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'baton-serve[bench]'") from error
    path = result_path(args)
    chat = args.backend == "openai-chat"
    server = client.Server(
        base_url=(args.base_url or f"http://{bracketed(args.host)}:{args.port}").rstrip("/"),
        endpoint=args.endpoint or ("/v1/chat/completions" if chat else "/v1/completions"),
        chat=chat,
        api_key=args.api_key,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
    )
    model, results, duration_s = uvloop.run(_measure(args, client.Client, server))
    metrics = report.summarise(results, duration_s, args.metric_percentiles, dict(args.goodput or ()))
    print(report.block(metrics, args.percentile_metrics), flush=True)
    for reason, count in report.errors(results):
        print(f"{count} failed: {reason}", file=sys.stderr)
    if path:
        _save(path, args, model, metrics, results)
    return 0 if metrics.completed else 1


def result_path(args: argparse.Namespace) -> Path | None:
    """Where the JSON result goes, if anywhere. Raises UserError, before a long run, when it can't be written there."""
    named = args.output_json or args.result_filename
    if not (args.save_result or args.save_detailed or args.append_result or named):
        return None
    default = f"{args.backend}-{args.request_rate:g}qps-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    return bench_args.checked_path(Path(args.result_dir or ".") / (named or default))


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
        conversations = dataset.read_sharegpt(bench_args.sharegpt_path(args), args.seed)
        requests = await dataset.sharegpt_requests(
            conversations, count, args.sharegpt_output_len, lambda text: client.count_tokens(model, text)
        )
    return requests[: args.num_warmups], requests[args.num_warmups :]


def _save(
    path: Path, args: argparse.Namespace, model: str, metrics: report.Metrics, results: list[report.Result]
) -> None:
    """One JSON object: the figures, and on demand lists with one entry per request."""
    content: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": args.backend,
        "model_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate if args.request_rate < float("inf") else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **dict(args.metadata or ()),
        **report.flat(metrics),
    }
    if args.save_detailed:
        content |= {
            "input_lens": [result.input_tokens for result in results],
            "output_lens": [result.output_tokens for result in results],
            "ttfts": [result.ttft_s for result in results],
            "itls": [result.itl_s for result in results],
            "errors": [result.error for result in results],
        }
    bench_args.write_json(path, content, args.append_result)
