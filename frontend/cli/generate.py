"""Complete prompts in one process, without a server: from --prompt, or one per line of standard input."""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from baton.frontend.cli import engine_args, offline
from baton.proto.errors import UserError

if TYPE_CHECKING:
    from baton.frontend.llm import LLM, CompletionOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `baton generate`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags; the command line wins")
    engine_args.add_model_arguments(parser)
    engine_args.add_worker_arguments(parser)
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="default: the lines of standard input")
    group.add_argument("--chat", action="store_true", help="each prompt is a user's message in the chat template")
    group.add_argument("--chat-template", default="", metavar="FILE", help="jinja2 file; default: the tokenizer's")
    group.add_argument("--max-tokens", type=engine_args.positive, default=64)
    group.add_argument("--temperature", type=float, help="default: the model's; 0 is greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--sampling-seed", type=int, help="the same seed gives the same tokens")
    group.add_argument("--ignore-eos", action="store_true")
    group.add_argument("--json", action="store_true", help="one JSON object per prompt, with token ids")


def run(args: argparse.Namespace) -> int:
    """Print the completions in the order of the prompts."""
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or lines on standard input")
    with offline.load(args) as llm:
        started = time.monotonic()
        outputs = _complete(llm, args, prompts)
        took_s = time.monotonic() - started
    for prompt, output in zip(prompts, outputs, strict=True):
        print(json.dumps({"prompt": prompt, **_fields(output)}, ensure_ascii=False) if args.json else output.text)
    count = sum(len(output.token_ids) for output in outputs)
    print(f"{count} tokens in {took_s:.2f} s", file=sys.stderr)
    return 0


def _complete(llm: "LLM", args: argparse.Namespace, prompts: list[str]) -> "list[CompletionOutput]":
    from baton.frontend import SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.sampling_seed,
        ignore_eos=args.ignore_eos,
    )
    try:
        if args.chat:
            answers = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params)
        else:
            answers = llm.generate(prompts, params)
    except ValueError as error:
        raise UserError(str(error)) from error
    return [answer.outputs[0] for answer in answers]


def _fields(output: "CompletionOutput") -> dict[str, Any]:
    return {"text": output.text, "token_ids": output.token_ids, "finish_reason": output.finish_reason}
