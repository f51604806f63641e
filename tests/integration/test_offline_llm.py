"""The model in this process, without a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.frontend import LLM, SamplingParams
from baton.proto.config import CacheConfig
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
