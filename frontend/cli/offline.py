"""The model in this process, from the flags of engine_args: for commands that need no server."""

import argparse
import os
from typing import TYPE_CHECKING

import msgspec

from baton.frontend.cli import engine_args, sizing
from baton.frontend.processes import cpu_count, thread_environment

if TYPE_CHECKING:
    from baton.frontend.llm import LLM


def load(args: argparse.Namespace) -> "LLM":
    """The model that the flags describe, ready. Raises UserError for what the user can mend."""
    directory = engine_args.resolve_model(args)
    plan = sizing.plan(args, sizing.read_model_size(directory, args.dtype, args.load_format), num_workers=1)
    model = engine_args.model_config(args, directory, plan.max_model_len)
    batch = engine_args.batch_config(args)
    if batch.target_itl_ms is None:
        batch = msgspec.structs.replace(batch, target_itl_ms=0.0)  # nobody watches the tokens arrive
    # Read when torch loads, with LLM.
    os.environ.update(thread_environment(args.threads or cpu_count(), alone=args.device == "cpu"))
    from baton.frontend import LLM

    return LLM(
        model.path,
        tokenizer=model.tokenizer,
        chat_template=model.chat_template,
        dtype=model.dtype,
        batch_invariant=model.batch_invariant,
        load_format=model.load_format,
        seed=model.seed,
        max_model_len=model.max_model_len,
        device=args.device,
        gpu=engine_args.gpus_of(args, 1)[0],
        attention_backend=args.attention_backend,
        threads=args.threads or 0,
        cache=engine_args.cache_config(args, plan.pool_bytes),
        batch=batch,
    )
