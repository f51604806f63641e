"""Fields that decide what is computed and how an answer tells it, without a cluster."""

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError
from baton.frontend.api.formats import ChatFormat, CompletionFormat
from baton.frontend.api.inputs import Cut, prompts_of
from baton.frontend.api.params import MAX_PROMPT_LOGPROBS, Wishes, read_wishes
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.requests import ChatCompletionRequest, CompletionRequest, parse
from baton.frontend.api.responses import Usage, encode
from baton.frontend.chat_template import ChatTemplate
from baton.frontend.detokenizer import Detokenizer
from baton.frontend.engine_client import Output
from baton.frontend.instructions import Finished
from baton.frontend.model_info import ModelInfo, SamplingDefaults
from baton.frontend.tokenizer import Tokenizer
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.lifecycle import Outcome
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import Ledger, TokenLogprobs

BOS, EOS = 256, 257


def one_token_per_byte() -> Tokenizer:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return Tokenizer(backend, {"eos_token": "<eos>", "bos_token": "<bos>"})


TOKENIZER = one_token_per_byte()
INFO = ModelInfo(("small",), 100, 300, (EOS,), SamplingDefaults())
TEMPLATE = ChatTemplate(
    "{% for d in documents or [] %}({{ d.title }}){% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '!' if loud }}",
    {},
)
PROMPTS = Prompts(TOKENIZER, TEMPLATE, INFO)


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"prompt": "abc", **fields}).encode(), CompletionRequest)[0]


def chat(**fields: Any) -> tuple[ChatCompletionRequest, dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(json.dumps(body).encode(), ChatCompletionRequest)[:2]


def wishes(**fields: Any) -> Wishes:
    return read_wishes(completion(**fields), INFO, max_logprobs=5)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def prompt_ids(**fields: Any) -> list[int]:
    return PROMPTS.of_completion(completion(**fields))[0].ids.tolist()


class Stops:
    def stop(self, _index: int) -> Finished | None:
        return None


def packed(*entries: tuple[float, int, list[tuple[int, float]]]) -> bytes:
    rows = []
    for logprob, rank, top in entries:
        floats = np.array([logprob, *(value for _, value in top)], dtype=np.float32).view(np.int32).tolist()
        rows.append([floats[0], rank, *(id for id, _ in top), *floats[1:]])
    return np.array(rows, dtype=np.int32).tobytes()


def answer(request: CompletionRequest, tokens: list[int], **output: Any) -> dict[str, Any]:
    """The whole answer when these tokens came."""
    wanted = read_wishes(request, INFO, 5)
    (prompt,) = PROMPTS.of_completion(request)
    choice = Choice(0, prompt, wanted.for_prompt(len(prompt.ids), INFO, "prompt"), wanted, TOKENIZER)
    logprobs = [TokenLogprobs(-1.0, 1, ((token, -1.0),)) for token in tokens]
    finished = Finished((1, 1), Outcome.LENGTH, Ledger(), len(tokens))
    delta = choice.take(Output(tokens=tokens, logprobs=logprobs, finished=finished, **output), Stops())
    format = CompletionFormat("small", wanted, TOKENIZER)
    return json.loads(encode(format.whole([(choice, delta)], Usage(1, 3, choice.num_tokens), Ledger())))


def test_truncation_keeps_one_side_and_the_special_tokens() -> None:
    assert prompt_ids(prompt="abcdef", truncate_prompt_tokens=3) == [BOS, *ids("ef")]
    assert prompt_ids(prompt="abcdef", truncate_prompt_tokens=3, truncation_side="right") == [BOS, *ids("ab")]
    assert prompt_ids(prompt="abcdef", truncate_prompt_tokens=3, add_special_tokens=False) == ids("def")
    assert prompt_ids(prompt=[1, 2, 3, 4], truncate_prompt_tokens=3) == [2, 3, 4]
    assert prompt_ids(prompt=[[1, 2, 3, 4]], truncate_prompt_tokens=3, truncation_side="right") == [1, 2, 3]
    assert prompt_ids(prompt="x" * 500, truncate_prompt_tokens=-1, max_tokens=30) == [BOS, *ids("x" * 69)]
    request, raw = chat(truncate_prompt_tokens=2)
    assert PROMPTS.of_chat(request, raw).ids.tolist() == ids("hi")


@pytest.mark.parametrize("count", [0, -2, 100])
def test_a_truncation_that_can_not_be_is_refused(count: int) -> None:
    with pytest.raises(ApiError) as caught:
        prompt_ids(truncate_prompt_tokens=count)
    assert caught.value.body.error.param == "truncate_prompt_tokens"


def test_special_tokens_are_added_to_completions_and_not_to_chats_unless_asked() -> None:
    assert prompt_ids(prompt="a") == [BOS, *ids("a")]
    assert prompt_ids(prompt="a", add_special_tokens=False) == ids("a")
    request, raw = chat(add_special_tokens=True)
    assert PROMPTS.of_chat(request, raw).ids[0] == BOS
    assert PROMPTS.of_chat(*chat()).ids[0] != BOS


def test_documents_and_arguments_reach_the_template() -> None:
    request, raw = chat(documents=[{"title": "T", "text": "…"}], chat_template_kwargs={"loud": True})
    assert TOKENIZER.decode(PROMPTS.of_chat(request, raw).ids.tolist()) == "(T)[user]hi!"


def test_reasoning_effort_reaches_the_template_and_none_is_no_thinking() -> None:
    template = ChatTemplate("{{ reasoning_effort }}/{{ enable_thinking }}", {})

    def rendered(**fields: Any) -> str:
        request, raw = chat(**fields)
        return TOKENIZER.decode(Prompts(TOKENIZER, template, INFO).of_chat(request, raw).ids.tolist())

    assert rendered() == "/"
    assert rendered(reasoning_effort="low") == "low/True"
    assert rendered(reasoning_effort="none") == "none/False"
    assert rendered(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}) == "low/False"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_comes_back_is_there_for_the_template_under_both_its_names(name: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.reasoning }}{{ m.reasoning_content }}{% endfor %}", {})
    request, raw = chat(messages=[{"role": "assistant", "content": "yes", name: "hm"}])
    assert TOKENIZER.decode(Prompts(TOKENIZER, template, INFO).of_chat(request, raw).ids.tolist()) == "hmhm"


def test_a_salt_changes_every_hash_of_the_prompt() -> None:
    def hashes(**fields: Any) -> bytes:
        return PROMPTS.of_completion(completion(prompt="x" * 40, **fields))[0].hashes

    plain, one, other = hashes(), hashes(cache_salt="one"), hashes(cache_salt="other")
    units = [[chain[i : i + 16] for i in range(0, len(chain), 16)] for chain in (plain, one, other)]
    assert len({unit for chain in units for unit in chain}) == 3 * len(units[0]) == 9
    assert hashes(cache_salt="one") == one
    assert plain == pack_hashes(hash_chain(np.array(prompt_ids(prompt="x" * 40), dtype=np.int32)))
    for wrong in ("", "s" * 1025):
        with pytest.raises(ApiError, match="cache_salt"):
            hashes(cache_salt=wrong)


def test_text_whose_token_the_model_has_no_embedding_of_is_refused() -> None:
    info = ModelInfo(("small",), 100, EOS, (), SamplingDefaults())
    prompts, cut = Prompts(TOKENIZER, TEMPLATE, info), Cut(True, None, "right")
    assert prompts.of_completion(completion(prompt="eos"))
    for refused in (
        lambda: prompts.of_completion(completion(prompt="<eos>")),
        lambda: prompts.of_bad_words(("<eos>",)),
        lambda: prompts_of(["<eos>"], cut, TOKENIZER, info, "input"),
    ):
        with pytest.raises(ApiError, match=f"token id {EOS} is out of vocabulary; ids are from 0 to {EOS - 1}"):
            refused()


def test_bad_words_are_banned_at_the_beginning_and_behind_a_space() -> None:
    vocab = {"a": 0, "b": 1, "\u0120": 2, "\u0120a": 3, "ab": 4, "\u0120ab": 5}
    merges = [("\u0120", "a"), ("a", "b"), ("\u0120", "ab")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    prompts = Prompts(Tokenizer(backend), None, INFO)
    assert prompts.of_bad_words(("a", "b", " a")) == ((0,), (3,), (1,))
    assert PROMPTS.of_bad_words(("ab",)) == (tuple(ids("ab")),)
    with pytest.raises(ApiError, match="drops"):
        prompts.of_bad_words(("c",))


def test_an_echo_begins_with_the_prompt_and_its_logprobs() -> None:
    told = PromptLogprobs(1, packed((-0.5, 2, [(7, -0.25)]), (-1.5, 1, [(9, -1.5)]), (-2.0, 1, [(9, -2.0)])))
    request = completion(prompt="abc", echo=True, logprobs=1, max_tokens=1)
    assert read_wishes(request, INFO, 5).sampling.prompt_logprobs == 1
    (choice,) = answer(request, ids("d"), prompt_logprobs=told)["choices"]
    assert choice["text"] == "abcd"
    assert choice["logprobs"]["tokens"] == ["<bos>", "a", "b", "c", "d"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -1.5, -2.0, -1.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][1] == {"a": -0.5, TOKENIZER.token(7): -0.25}
    assert choice["logprobs"]["text_offset"] == [0, 5, 6, 7, 8]
    assert choice["prompt_logprobs"] is None


def test_an_echo_has_as_many_alternatives_as_its_logprobs_say_whatever_prompt_logprobs_do() -> None:
    told = PromptLogprobs(2, packed((-0.5, 2, [(7, -0.25), (8, -0.75)]), (-1.5, 1, [(9, -1.5), (8, -2.0)])))
    request = completion(prompt=ids("abc"), echo=True, logprobs=1, prompt_logprobs=2, max_tokens=1)
    (choice,) = answer(request, ids("d"), prompt_logprobs=told)["choices"]
    seven, nine = TOKENIZER.token(7), TOKENIZER.token(9)
    assert choice["logprobs"]["top_logprobs"][1:3] == [{"b": -0.5, seven: -0.25}, {"c": -1.5, nine: -1.5}]
    assert [len(position) for position in choice["prompt_logprobs"][1:]] == [3, 3]


def test_an_echo_alone_computes_one_token_and_shows_none() -> None:
    request = completion(prompt=[ids("ab")], echo=True, max_tokens=0, return_token_ids=True)
    assert read_wishes(request, INFO, 5).for_prompt(2, INFO, "prompt").max_tokens == 1
    told = answer(request, ids("x"))
    (choice,) = told["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("ab", "length", [])
    assert told["usage"]["completion_tokens"] == 0
    with pytest.raises(ApiError, match="at least 1"):
        wishes(max_tokens=0)


def test_prompt_logprobs_name_each_position_by_token_id() -> None:
    told = PromptLogprobs(1, packed((-0.5, 2, [(7, -0.25)]), (float("-inf"), 3, [(9, -1.5)])))
    answered = answer(completion(prompt=ids("abc"), prompt_logprobs=1), ids("d"), prompt_logprobs=told)
    _, b, c = ids("abc")
    assert answered["choices"][0]["prompt_logprobs"] == [
        None,
        {
            str(b): {"logprob": -0.5, "rank": 2, "decoded_token": "b"},
            "7": {"logprob": -0.25, "rank": 1, "decoded_token": TOKENIZER.token(7)},
        },
        {
            str(c): {"logprob": -9999.0, "rank": 3, "decoded_token": "c"},
            "9": {"logprob": -1.5, "rank": 1, "decoded_token": TOKENIZER.token(9)},
        },
    ]
    assert answered["kv_transfer_params"] is None


def test_prompt_logprobs_are_bounded() -> None:
    wide = ModelInfo(("small",), 2**21, 300, (EOS,), SamplingDefaults())
    given = wishes(prompt_logprobs=3)
    assert given.for_prompt(MAX_PROMPT_LOGPROBS // 4, wide, "prompt").prompt_logprobs == 3
    with pytest.raises(ApiError, match="too many"):
        given.for_prompt(MAX_PROMPT_LOGPROBS // 4 + 1, wide, "prompt")
    wishes(prompt_logprobs=3, n=2).check_answer(MAX_PROMPT_LOGPROBS // 4)
    with pytest.raises(ApiError, match="too many"):
        wishes(prompt_logprobs=3, n=2).check_answer(MAX_PROMPT_LOGPROBS // 4 + 1)
    wishes(n=128).check_answer(2**40)


def test_long_lists_are_not_for_many_streams() -> None:
    wide = ModelInfo(("small",), 100, 200_000, (EOS,), SamplingDefaults())
    given = read_wishes(completion(allowed_token_ids=list(range(150_000)), n=2), wide, 5)
    given.check_volume(8)
    with pytest.raises(ApiError, match="100 output streams"):
        given.check_volume(50)


def test_logprobs_without_alternatives_are_those_of_the_tokens() -> None:
    told = PromptLogprobs(0, packed((-0.5, 2, [])))
    request = completion(prompt=ids("ab"), echo=True, logprobs=0, max_tokens=1)
    (choice,) = answer(request, ids("c"), prompt_logprobs=told)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"c": -1.0}]


def test_tokens_may_be_written_as_ids() -> None:
    a = ids("a")[0]
    (choice,) = answer(completion(logprobs=1, return_tokens_as_token_ids=True), [a])["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{a}"]
    assert choice["logprobs"]["top_logprobs"] == [{f"token_id:{a}": -1.0}]
    wanted = read_wishes(chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)[0], INFO, 5)
    choice_of_chat = Choice(0, PROMPTS.of_chat(*chat()), wanted.sampling, wanted, TOKENIZER)
    delta = Delta("a", [a], [TokenLogprobs(-1.0, 1, ((a, -1.0),))], "length")
    whole = json.loads(
        encode(ChatFormat("small", wanted, TOKENIZER).whole([(choice_of_chat, delta)], Usage(1, 2, 1), Ledger()))
    )
    assert whole["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{a}"
    assert (whole["prompt_logprobs"], whole["kv_transfer_params"]) == (None, None)


def test_alternatives_that_read_alike_are_all_there_and_the_likeliest_keeps_its_text() -> None:
    first, second = ids("é")
    wanted = wishes(logprobs=2)
    (prompt,) = PROMPTS.of_completion(completion())
    choice = Choice(0, prompt, wanted.sampling, wanted, TOKENIZER)
    delta = Delta("", [second], [TokenLogprobs(-2.0, 3, ((first, -0.5), (ids("a")[0], -1.0)))], "length")
    format = CompletionFormat("small", wanted, TOKENIZER)
    whole = json.loads(encode(format.whole([(choice, delta)], Usage(1, 2, 1), Ledger())))
    expected = {"\ufffd": -0.5, "a": -1.0, f"token_id:{second}": -2.0}
    assert whole["choices"][0]["logprobs"]["top_logprobs"] == [expected]


def test_chosen_alternatives_turn_logprobs_on() -> None:
    given = wishes(logprob_token_ids=[5, 3, 5])
    assert (given.logprobs, given.sampling.logprobs, given.sampling.logprob_token_ids) == (0, 0, (5, 3))


def test_a_continued_message_may_be_echoed() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure,"}]
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
    assert read_wishes(chat(**fields)[0], INFO, 5).prefix == "Sure,"
    assert read_wishes(chat(echo=True)[0], INFO, 5).prefix == ""


def test_a_requests_own_id_is_in_the_answers() -> None:
    assert answer(completion(request_id="mine"), ids("a"))["id"] == "cmpl-mine"


def test_n_samples_need_no_best_of() -> None:
    assert wishes(n=3, best_of=3).n == wishes(n=3, best_of=1).n == 3


def test_spaces_between_special_tokens_are_those_of_the_tokenizer_unless_they_are_not_wanted() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<x>", "<y>"])
    tokenizer = Tokenizer(backend)

    def text(spaces: bool) -> str:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        return detokenizer.feed([0, 3, 4, 1]) + detokenizer.flush()

    assert text(True) == "a <x> <y> b"
    assert text(False) == "a <x><y>b"
