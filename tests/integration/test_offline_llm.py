"""The model in this process, without a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.frontend import LLM, PoolingParams, SamplingParams
from baton.proto.config import CacheConfig, PoolerConfig
from baton.proto.errors import UserError

OPTIONS = {"max_tokens": 6, "ignore_eos": True, "seed": 4, "temperature": 1.0}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), load_format="dummy", max_model_len=256, cache=CacheConfig(num_blocks=64)) as llm:
        yield llm


def test_each_prompt_gets_its_outputs_in_order(llm: LLM) -> None:
    both = llm.generate(["one two", [100, 101, 102]], SamplingParams(n=2, **OPTIONS))
    assert [len(request.prompt_token_ids) for request in both] == [2, 3]
    assert [output.index for request in both for output in request.outputs] == [0, 1, 0, 1]
    assert {len(output.token_ids) for request in both for output in request.outputs} == {6}
    (alone,) = llm.generate([[100, 101, 102]], SamplingParams(n=2, **OPTIONS))
    assert [output.token_ids for output in alone.outputs] == [output.token_ids for output in both[1].outputs]


def test_logprobs_name_the_chosen_token_and_the_best(llm: LLM) -> None:
    (output,) = llm.generate("one", SamplingParams(logprobs=2, **OPTIONS))[0].outputs
    assert output.logprobs is not None
    for id, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert len(entry) in (2, 3)
        assert id in entry
    assert output.cumulative_logprob == sum(
        e[id].logprob for id, e in zip(output.token_ids, output.logprobs, strict=True)
    )


def test_a_stop_string_ends_the_text(llm: LLM) -> None:
    (whole,) = llm.generate("one", SamplingParams(**OPTIONS))[0].outputs
    stop = whole.text[3:6]
    (cut,) = llm.generate("one", SamplingParams(stop=stop, **OPTIONS))[0].outputs
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[: whole.text.index(stop)], "stop", stop)


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    params = SamplingParams(**OPTIONS)
    (alone,) = llm.chat(conversation, params)
    assert [each.outputs for each in llm.chat([conversation, conversation], params)] == [alone.outputs] * 2


@pytest.mark.parametrize(
    "params", [SamplingParams(top_p=3), SamplingParams(max_tokens=500), SamplingParams(logprobs=99)]
)
def test_bad_arguments_say_what_is_wrong(llm: LLM, params: SamplingParams) -> None:
    with pytest.raises(ValueError, match=r"must be|too large"):
        llm.generate("one", params)


def test_a_missing_model_is_the_users_error() -> None:
    with pytest.raises(UserError, match="/nowhere"):
        LLM("/nowhere/model")


def test_vectors_come_in_order_and_beside_generation(llm: LLM) -> None:
    (before,) = llm.generate([[100, 101, 102]], SamplingParams(**OPTIONS))
    outputs = llm.embed(["one two", [100, 101, 102]])
    assert [len(output.prompt_token_ids) for output in outputs] == [2, 3]
    assert [sum(x * x for x in output.outputs.embedding) for output in outputs] == pytest.approx([1, 1], abs=1e-5)
    (alone,) = llm.embed([100, 101, 102])
    assert alone.outputs.embedding == pytest.approx(outputs[1].outputs.embedding, abs=1e-6)
    assert alone.ledger.computed_tokens == 3
    assert llm.embed([]) == []
    (after,) = llm.generate([[100, 101, 102]], SamplingParams(**OPTIONS))
    assert before.outputs[0].token_ids == after.outputs[0].token_ids


def test_scores_are_cosines_of_vectors(llm: LLM) -> None:
    one, two, three = (output.outputs.embedding for output in llm.embed(["one", "two", "three"]))
    scores = [output.outputs.score for output in llm.score("one", ["two", "three"])]
    expected = [sum(a * b for a, b in zip(one, other, strict=True)) for other in (two, three)]
    assert scores == pytest.approx(expected, abs=1e-5)
    (itself,) = llm.score(["one"], ["one"])
    assert itself.outputs.score == pytest.approx(1, abs=1e-5)


def test_pooling_parameters(tiny_model: Path) -> None:
    pooler = PoolerConfig(pooling_type="MEAN", normalize=False, matryoshka_dimensions=())
    options = {"load_format": "dummy", "max_model_len": 128, "cache": CacheConfig(num_blocks=16)}
    with LLM(str(tiny_model), pooler=pooler, **options) as llm:  # type: ignore[arg-type]
        prompt = list(range(100, 228))  # fills the context
        whole, half = (llm.embed(part)[0].outputs.embedding for part in (prompt, prompt[:64]))
        assert sum(x * x for x in whole) != pytest.approx(1, abs=1e-3)
        (cut,) = llm.embed(prompt, pooling_params=PoolingParams(truncate_prompt_tokens=64, dimensions=8))
        assert cut.outputs.embedding == pytest.approx(half[:8], abs=1e-6)
        (unit,) = llm.embed(prompt, pooling_params=PoolingParams(normalize=True))
        assert sum(x * x for x in unit.outputs.embedding) == pytest.approx(1, abs=1e-5)
        with pytest.raises(ValueError, match="maximum context length is 128"):
            llm.embed([*prompt, 1])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (PoolingParams(dimensions=3), "dimensions"),
        (PoolingParams(truncate_prompt_tokens=0), "truncate_prompt_tokens"),
        (PoolingParams(truncation_side="up"), "truncation_side"),
    ],
)
def test_bad_pooling_parameters_say_what_is_wrong(llm: LLM, params: PoolingParams, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llm.embed("one", pooling_params=params)


def test_pairs_that_do_not_match_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 texts and data_2 3"):
        llm.score(["one", "two"], ["one", "two", "three"])
