"""Measure offline throughput: all requests at once in this process, with vLLM's option names and result line."""

import argparse
import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from baton.frontend.bench import dataset
from baton.frontend.cli import bench_args, engine_args, offline
from baton.proto.errors import UserError

if TYPE_CHECKING:
    from baton.frontend.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `baton bench throughput`."""
    bench_args.add_model(parser)
    group = parser.add_argument_group("work")
    bench_args.add_dataset(group)
    group.add_argument("--n", type=engine_args.positive, default=1, help="outputs per prompt")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--output-json", metavar="FILE", help="write the JSON result here")


def run(args: argparse.Namespace) -> int:
    """Generate everything, print one line."""
    bench_args.settle_model(args)
    path = bench_args.checked_path(Path(args.output_json)) if args.output_json else None
    with offline.load(args) as llm:
        requests = _requests(args, llm)
        prompt_tokens, output_tokens, elapsed_s = _generate(args, llm, requests)
    total = prompt_tokens + output_tokens
    print(
        f"Throughput: {len(requests) / elapsed_s:.2f} requests/s, {total / elapsed_s:.2f} total tokens/s, "
        f"{output_tokens / elapsed_s:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {prompt_tokens}\nTotal num output tokens:  {output_tokens}"
    )
    if path:
        result = {
            "elapsed_time": elapsed_s,
            "num_requests": len(requests),
            "total_num_tokens": total,
            "total_output_tokens": output_tokens,
            "requests_per_second": len(requests) / elapsed_s,
            "tokens_per_second": total / elapsed_s,
            "output_tokens_per_second": output_tokens / elapsed_s,
        }
        bench_args.write_json(path, result)
    return 0


def _requests(args: argparse.Namespace, llm: "LLM") -> list[dataset.Request]:
    if args.dataset_name == "random":
        lengths = (args.random_input_len, args.random_output_len, args.random_range_ratio)
        work = dataset.random_work(args.num_prompts, *lengths, args.seed)
        return [dataset.Request(prompt, output_len) for prompt, output_len in work]
    conversations = dataset.read_sharegpt(bench_args.sharegpt_path(args), args.seed)
    tokenizer = llm.get_tokenizer()

    async def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    return asyncio.run(
        dataset.sharegpt_requests(conversations, args.num_prompts, args.sharegpt_output_len, count_tokens)
    )


def _generate(args: argparse.Namespace, llm: "LLM", requests: list[dataset.Request]) -> tuple[int, int, float]:
    """Prompt tokens, output tokens and the seconds that they took."""
    from baton.frontend import SamplingParams

    params = [
        SamplingParams(n=args.n, max_tokens=request.output_len, temperature=args.temperature, ignore_eos=True)
        for request in requests
    ]
    started = time.perf_counter()
    try:
        outputs = llm.generate([request.prompt for request in requests], params)
    except ValueError as error:
        raise UserError(str(error)) from error
    elapsed_s = time.perf_counter() - started
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return prompt_tokens, sum(len(one.token_ids) for output in outputs for one in output.outputs), elapsed_s
