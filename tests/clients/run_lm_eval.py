"""`lm-eval`: tasks of our own over HTTP and with its `hf` backend on the same weights; the scores must be equal.

scripts/test_clients lm-eval

Prompts go as nested lists of token ids to /v1/completions with `echo` and `logprobs`, several in one request.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from served import OFFLINE, model_directory, served

os.environ.update(OFFLINE)  # read when the libraries below are loaded

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"
MAX_DIFFERENCE = 1e-3
"""Of a log-likelihood: both sides compute in float32, and sum in different orders."""


def evaluate(model: str, **model_args: Any) -> dict[str, Any]:
    """Results and samples."""
    names = ["baton_facts", "baton_story"]
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(model, model_args, tasks=names, task_manager=manager, device="cpu", bootstrap_iters=0)


def log_likelihoods(found: dict[str, Any]) -> list[float]:
    """Of every choice and every text, in order."""
    by_id = [sorted(found["samples"][task], key=lambda sample: sample["doc_id"]) for task in sorted(found["samples"])]
    responses = [response for samples in by_id for sample in samples for response in sample["filtered_resps"]]
    return [float(each[0] if isinstance(each, (tuple, list)) else each) for each in responses]


def scores(found: dict[str, Any]) -> dict[str, float]:
    """Name of task and metric -> value."""
    return {
        f"{task} {metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def main() -> None:
    os.chdir(TASKS)  # the tasks name their data relative to themselves
    directory = model_directory()
    with served() as url:
        over_http = evaluate(
            "local-completions",
            base_url=f"{url}/v1/completions",
            model="demo",
            tokenizer=directory,
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            num_concurrent=2,
            batch_size=4,
            max_length=2048,
        )
    reference = evaluate("hf", pretrained=directory, dtype="float32", max_length=2048)
    ours, theirs = scores(over_http), scores(reference)
    apart = [abs(a - b) for a, b in zip(log_likelihoods(over_http), log_likelihoods(reference), strict=True)]
    print(json.dumps({"baton": ours, "hf": theirs, "samples": len(apart), "largest difference": max(apart)}, indent=2))
    exact = [name for name in ours if name.startswith("baton_facts") and ours[name] != theirs[name]]
    if exact or max(apart) > MAX_DIFFERENCE or any(abs(ours[name] - theirs[name]) > MAX_DIFFERENCE for name in theirs):
        sys.exit("error: the scores differ")


if __name__ == "__main__":
    main()
