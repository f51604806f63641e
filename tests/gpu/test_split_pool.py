"""Prefill and decode in two processes on one GPU, served over HTTP, against transformers on the same GPU."""

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("fastapi")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from support.deployment import Deployment  # noqa: E402
from support.kills import kill_in_place  # noqa: E402

pytestmark = pytest.mark.gpu

VOCAB = 3000
MAX_TOKENS = 40
TIE = 1e-3
GROWTH_MB = 256.0
"""Of four workers together. The context of one process that stayed would be 500."""
SPLIT = ("--prefill", "1", "--decode", "1", "--device", "cuda", "--gpus", "0", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A random model of transformers on the GPU, and its checkpoint with a tokenizer of one word a token."""
    if device != "cuda":
        pytest.skip("no GPU")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("model")
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(directory)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))
    yield reference.cuda(), directory
    torch.cuda.empty_cache()


def random_prompts(count: int) -> list[list[int]]:
    return [
        [random.randrange(3, VOCAB) for _ in range(random.choice((1, 15, 16, 40, 300, 1500)))] for _ in range(count)
    ]


def check(reference: Any, prompt: list[int], output: list[int]) -> None:
    """Every token is the reference's best after the tokens before it, or as good as that."""
    assert len(output) == MAX_TOKENS
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + output], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
    best = logits.max(-1).values
    chosen = logits[range(len(output)), output]
    assert (best - chosen).max() < TIE


def complete_all(deployment: Deployment, prompts: list[list[int]]) -> list[list[int]]:
    answers = deployment.complete_all(
        prompts, max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, return_token_ids=True
    )
    return [answer["choices"][0]["token_ids"] for answer in answers]


def free_mb(deployment: Deployment, prompts: list[list[int]]) -> float:
    """What the GPU has left once these have been served."""
    complete_all(deployment, prompts)
    deployment.wait_idle()
    return torch.cuda.mem_get_info()[0] / 2**20


NO_CACHE = "--no-enable-prefix-caching"


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-blocks", "1000"),
        ("--num-blocks", "1000", "--max-num-batched-tokens", "256", NO_CACHE),
        ("--gpu-memory-utilization", "0.5", NO_CACHE),  # others of the suite use the GPU too, which counts
        ("--num-blocks", "1000", "--kv-transfer", "cuda_ipc", NO_CACHE),
    ],
    ids=["copied for the prefix cache", "swapped, in chunks", "pool measured", "copied as asked for"],
)
def test_tokens_are_those_of_transformers(model: tuple[Any, Path], flags: tuple[str, ...]) -> None:
    reference, directory = model
    prompts = random_prompts(40)
    with Deployment(*SPLIT, *flags, model=str(directory)) as deployment:
        outputs = complete_all(deployment, prompts)
        pulled = deployment.total("baton_tokens_total", 'source="pulled"')
        deployment.wait_idle()
        copied = any("decode-0 reads prefill-0 through cuda_ipc" in line for line in deployment.lines)
    for prompt, output in zip(prompts, outputs, strict=True):
        check(reference, prompt, output)
    assert pulled == sum(map(len, prompts))
    assert copied == (NO_CACHE not in flags or "cuda_ipc" in flags)


def test_weights_are_in_memory_once(model: tuple[Any, Path]) -> None:
    """Loading says so: the second worker finds them."""
    _, directory = model
    with Deployment(*SPLIT, "--num-blocks", "1000", model=str(directory)) as deployment:
        found = [line for line in deployment.lines if "found the weights in the keeper's memory" in line]
    assert len(found) == 1


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_streams_outlive_a_killed_worker(model: tuple[Any, Path], victim: str) -> None:
    reference, directory = model
    prompts = random_prompts(60)
    flags = ("--num-blocks", "1000", NO_CACHE)
    with Deployment(*SPLIT, *flags, model=str(directory)) as deployment, ThreadPoolExecutor(1) as pool:
        complete_all(deployment, prompts[:1])
        beside = pool.submit(complete_all, deployment, prompts)
        psutil.Process(deployment.pids()[victim]).send_signal(signal.SIGKILL)
        outputs = beside.result()
        deployment.wait_for(f"{victim} is ready again")
        deployment.wait_idle()
    for prompt, output in zip(prompts, outputs, strict=True):
        check(reference, prompt, output)


@pytest.mark.timeout(400)
def test_kills_lose_no_request_and_change_no_token(smollm2: Path, request: pytest.FixtureRequest) -> None:
    """20 by `--kills 20`."""
    prompts = [[random.randrange(100, 40000) for _ in range(random.randrange(1, 600))] for _ in range(24)]
    flags = ("--prefill", "2", "--decode", "2", *SPLIT[4:], "--num-blocks", "2000", "--max-num-seqs", "64", NO_CACHE)
    with Deployment(*flags, model=str(smollm2)) as deployment:
        workers = ["decode-0", "prefill-0", "decode-1", "prefill-1"]
        before = free_mb(deployment, prompts)
        kill_in_place(deployment, workers, prompts, request.config.getoption("--kills"))
        after = free_mb(deployment, prompts)
    print(f"free on the GPU: {before:.0f} -> {after:.0f} MB")
    assert before - after < GROWTH_MB
