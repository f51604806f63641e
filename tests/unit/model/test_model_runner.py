"""The runner behind its plan interface: batching, chunking, block tables, slots taken again."""

import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baton.kernels.cpu.build import BuildError, build
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import SamplingParams
from baton.worker.plan import Row, SlotInit, StepPlan

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 700,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

VECTOR_MATH = {"acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma"}
VECTOR_MATH |= {"log", "log10", "log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh"}
"""torch's operations that oneMKL computes."""


@pytest.fixture
def dummy(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def _prompts() -> list[list[int]]:
    return [[random.randrange(700) for _ in range(length)] for length in (1, 33, 64, 130, 600)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_has_the_same_bits_alone_and_batched_whole_and_chunked(
    dummy: Path, make_driver: Callable[..., Any], temperature: float
) -> None:
    try:
        build()
    except BuildError as error:
        pytest.skip(str(error))
    prompts = _prompts()
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=11, logprobs=0)
    together = make_driver(dummy, load_format="dummy").generate(prompts, params)
    assert make_driver(dummy, load_format="dummy").generate(prompts, params, chunk=37) == together
    for index, prompt in enumerate(prompts):
        alone = make_driver(dummy, load_format="dummy", block_size=48).generate([prompt], params, chunk=100)
        assert (alone[0][0], alone[1][0]) == (together[0][index], together[1][index])


class Calls(TorchDispatchMode):
    """Elements of the first argument of each call of a torch operation, in order, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: defaultdict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            self.sizes[func.overloadpacket.__name__].append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_vector_functions_are_first_called_by_one_thread(dummy: Path, make_driver: Callable[..., Any]) -> None:
    """torch shares out calls of more than 2,048 elements, and the first must not be: see vector_math."""
    with Calls() as calls:
        make_driver(dummy, load_format="dummy").generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=1.0))
    shared_out = {name for name, sizes in calls.sizes.items() if max(sizes) > 2048}
    assert {"cos", "sin"} <= shared_out
    for name in shared_out & VECTOR_MATH:
        assert calls.sizes[name][0] == 1, name


def test_a_resumed_stream_goes_on_as_if_undisturbed(dummy: Path, make_driver: Callable[..., Any]) -> None:
    """Prompt and accepted tokens are computed again, under penalties that tell them apart."""
    prompt = [random.randrange(700) for _ in range(40)]
    params = SamplingParams(max_tokens=12, seed=5, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)
    whole = make_driver(dummy, load_format="dummy").generate([prompt], params)[0][0]
    driver = make_driver(dummy, load_format="dummy")
    tokens = prompt + whole[:5]
    resumed = []
    blocks = [driver.free.pop() for _ in range(4)]
    for index in range(5, 12):
        first = index == 5
        row = Row(
            3, 0 if first else 40 + index - 1, 45 if first else 1, tokens if first else [], not first, [], True, index
        )
        init = SlotInit(3, (0, 0), 1, params, 40, tokens, blocks)
        resumed += driver.runner.execute(StepPlan(index, [row], [init] if first else [])).tokens[0]
    assert resumed == whole[5:]


def test_a_slot_taken_again_keeps_nothing(dummy: Path, make_driver: Callable[..., Any]) -> None:
    driver = make_driver(dummy, load_format="dummy")
    prompts = _prompts()
    params = SamplingParams(max_tokens=6, temperature=0.0)
    expected = make_driver(dummy, load_format="dummy").generate(prompts, params)[0]
    biased = SamplingParams(max_tokens=6, seed=1, logit_bias={3: 100.0}, frequency_penalty=1.0, logprobs=2)
    driver.generate(list(reversed(prompts)), biased)
    assert driver.generate(prompts, params)[0] == expected


def test_rows_without_samples_give_no_tokens(dummy: Path, make_driver: Callable[..., Any]) -> None:
    driver = make_driver(dummy, load_format="dummy")
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0)
    inits = [SlotInit(slot, (0, slot), 0, params, 8, list(range(8)), [slot]) for slot in range(2)]
    rows = [Row(0, 0, 4, [0, 1, 2, 3], False, [], False, 0), Row(1, 0, 8, list(range(8)), False, [], True, 0)]
    result = driver.runner.execute(StepPlan(9, rows, inits))
    assert result.step == 9
    assert [len(tokens) for tokens in result.tokens] == [0, 1]
    assert set(result.logprobs) == {1}
    assert result.started_s < result.sampled_s
    only_chunks = driver.runner.execute(StepPlan(10, [Row(0, 4, 2, [4, 5], False, [], False, 0)], []))
    assert only_chunks.tokens == [[]]


def test_the_pool_must_fit_the_layout(dummy: Path, make_driver: Callable[..., Any]) -> None:
    driver = make_driver(dummy, load_format="dummy")
    group = driver.runner.layout.groups[0]
    assert group.block_bytes == 2 * 3 * 2 * 16 * 32 * 4
    with pytest.raises(ValueError, match="does not fit the layout"):
        driver.runner.attach_pool(torch.zeros(4, *group.shape[1:]))


def test_an_incomplete_config_is_one_clear_error(tmp_path: Path, make_driver: Callable[..., Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    with pytest.raises(ValueError, match=r"config\.json lacks 'hidden_size'"):
        make_driver(tmp_path, load_format="dummy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: Llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
    ],
)
def test_models_that_can_not_be_computed_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, make_driver: Callable[..., Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message):
        make_driver(tmp_path, load_format="dummy")


def test_prompt_logprobs_have_the_same_bits_whole_and_chunked(dummy: Path, make_driver: Callable[..., Any]) -> None:
    """And are those of a model that is asked for each position by itself."""
    try:
        build()
    except BuildError as error:
        pytest.skip(str(error))
    prompt = [random.randrange(700) for _ in range(90)]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, prompt_logprobs=2)

    def told(chunk: int) -> bytes:
        driver = make_driver(dummy, load_format="dummy")
        init = SlotInit(0, (0, 0), 1, params, len(prompt), prompt, list(range(6)))
        data = b""
        for start in range(0, len(prompt), chunk):
            end = min(start + chunk, len(prompt))
            targets = prompt[start + 1 : end + 1]
            row = Row(0, start, end - start, prompt[start:end], False, [], end == len(prompt), 0, targets)
            result = driver.runner.execute(StepPlan(start + 1, [row], [init] if start == 0 else []))
            data += result.prompt_logprobs.get(0, b"")
        return data

    whole = told(1000)
    assert told(37) == told(7) == whole
    entries = PromptLogprobs(2, whole).entries()
    ends = [prompt[:length] for length in range(1, len(prompt))]
    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, logit_bias={})
    _, expected = make_driver(dummy, load_format="dummy", num_blocks=600).generate(ends, asked)
    for entry, row, target in zip(entries, expected, prompt[1:], strict=True):
        assert entry.top == tuple((id, pytest.approx(value, abs=1e-6)) for id, value in row[0].top)
        assert (entry.rank == 1) == (entry.top[0][0] == target)


def test_blocks_are_copied_before_anything_is_computed(dummy: Path, make_driver: Callable[..., Any]) -> None:
    driver = make_driver(dummy, load_format="dummy")
    prompt = [random.randrange(700) for _ in range(20)]
    params = SamplingParams(max_tokens=9, temperature=0.0, logprobs=0)
    first = SlotInit(0, (0, 0), 1, params, 20, prompt, [5, 6])
    whole = driver.runner.execute(StepPlan(1, [Row(0, 0, 20, prompt, False, [], True, 0)], [first]))
    second = SlotInit(1, (0, 1), 1, params, 20, prompt, [5, 9])
    goes_on = Row(0, 20, 1, [], True, [], True, 1)
    shares = Row(1, 19, 1, prompt[19:], False, [], True, 0)
    step = driver.runner.execute(StepPlan(2, [goes_on, shares], [second], [(6, 9)]))
    assert (step.tokens[1], step.logprobs[1]) == (whole.tokens[0], whole.logprobs[0])
