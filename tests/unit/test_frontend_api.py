"""What the API makes of requests and of tokens, without a cluster."""

import asyncio
import json
import threading
from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError, outcome_error
from baton.frontend.api.formats import ChatFormat, CompletionFormat
from baton.frontend.api.generation import Generator, Job
from baton.frontend.api.params import Wishes, read_wishes
from baton.frontend.api.prompts import MAX_TOKENIZED_CHARS, Prompts
from baton.frontend.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    StreamOptions,
    TokenizeRequest,
    parse,
)
from baton.frontend.api.responses import Completion, Usage, encode
from baton.frontend.chat_template import ChatTemplate
from baton.frontend.engine_client import Output
from baton.frontend.instructions import Finished
from baton.frontend.model_info import ModelInfo, SamplingDefaults
from baton.frontend.tokenizer import Tokenizer
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.lifecycle import Outcome, RejectCode
from baton.proto.messages import Ledger, TokenLogprobs

EOS = 256
INFO = ModelInfo(("small", "alias"), 100, 300, (EOS,), SamplingDefaults(temperature=0.6, top_k=20))


def one_token_per_byte() -> Tokenizer:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, {"eos_token": "<eos>"})


TOKENIZER = one_token_per_byte()
TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt else '' }}", {}
)
PROMPTS = Prompts(TOKENIZER, TEMPLATE, INFO)


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest)[0]


def chat(**fields: Any) -> tuple[ChatCompletionRequest, dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    request, raw, _ = parse(json.dumps(body).encode(), ChatCompletionRequest)
    return request, raw


def wishes(**fields: Any) -> Wishes:
    return read_wishes(completion(**fields), INFO, max_logprobs=5)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"max_tokens": 10**20, "min_tokens": 10**20}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 6}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"priority": 2**70}, "priority"),
        ({"model": "other"}, "model"),
        ({"echo": 2}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"repetition_detection": {"max_pattern_size": 4, "min_count": 3}}, "repetition_detection"),
        ({"watermarking": True}, "watermarking"),
        ({"max_tokens": 4.5}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"echo": 1.0}, "echo"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [300]}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "min_tokens"),
        ({"logprob_token_ids": [300]}, "logprob_token_ids"),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"use_beam_search": True, "n": 65}, "n"),
        ({"use_beam_search": True, "stop": "x"}, "stop"),
        ({"use_beam_search": True, "length_penalty": 1e9}, "length_penalty"),
        ({"use_beam_search": True, "min_tokens": 1}, "min_tokens"),
        ({"use_beam_search": True, "repetition_penalty": 1.1}, "repetition_penalty"),
        ({"use_beam_search": True, "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"use_beam_search": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"use_beam_search": True, "n": 64, "stop_token_ids": [1, 2, 3, 4]}, "n"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        wishes(**fields)
    assert caught.value.body.error.param == param
    assert caught.value.status == (404 if param == "model" else 400)


def test_min_tokens_is_bounded_without_max_tokens_too() -> None:
    for min_tokens in (-1, 2**31, 1e30):
        request, _ = chat(min_tokens=min_tokens)
        with pytest.raises(ApiError, match="min_tokens must be") as caught:
            read_wishes(request, INFO, max_logprobs=5)
        assert (caught.value.status, caught.value.body.error.param) == (400, "min_tokens")


def test_fields_that_ask_for_nothing_are_no_hindrance_to_a_beam_search() -> None:
    idle = {"stop": [], "logit_bias": {}, "bad_words": [], "presence_penalty": 0.0, "repetition_penalty": 1.0}
    assert wishes(use_beam_search=True, n=4, stop_token_ids=[1, 2], **idle).length_penalty == 1.0


def test_unsupported_fields_of_chat_are_refused_and_their_harmless_values_are_not() -> None:
    field, harmless, harmful = "modalities", ["text"], ["audio"]
    chat(**{field: harmless})
    with pytest.raises(ApiError, match="not supported"):
        chat(**{field: harmful})


def test_unknown_fields_are_reported_and_known_ones_are_not() -> None:
    body = {"prompt": "x", "stop": None, "user": "me", "metadata": {}, "echo": False, "sampling_magic": 1}
    assert parse(json.dumps(body).encode(), CompletionRequest)[2] == ["sampling_magic"]


def test_null_is_no_wish() -> None:
    body = {"prompt": "x", "stream": None, "ignore_eos": None, "min_tokens": None, "priority": None}
    request = parse(json.dumps(body).encode(), CompletionRequest)[0]
    assert (request.stream, request.ignore_eos, request.min_tokens, request.priority) == (False, False, 0, 0)


@pytest.mark.parametrize("body", [b'{"prompt": "\xff\xfe"}', b"[" * 100_000])
def test_a_body_that_no_decoder_survives_is_the_clients_error(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, CompletionRequest)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'{"prompt": NaN}', b"\xff"])
def test_a_body_that_is_no_json_object_is_a_clear_error(body: bytes) -> None:
    with pytest.raises(ApiError, match="JSON") as caught:
        parse(body, CompletionRequest)
    assert caught.value.status == 400


def test_what_a_request_leaves_open_comes_from_the_models_defaults() -> None:
    sampling = wishes().sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 1.0)
    assert (wishes(temperature=0).sampling.temperature, wishes(top_k=-1).sampling.top_k) == (0, 0)


def test_a_seed_is_drawn_for_each_prompt_where_none_is_given() -> None:
    def seed(given: Wishes) -> int:
        return given.for_prompt(1, INFO, "prompt").seed

    free, also_free, fixed = wishes(), wishes(seed=-1), wishes(seed=-2)
    assert len({seed(free), seed(free), seed(also_free), seed(also_free)}) == 4
    assert seed(fixed) == 2**64 - 2


def test_only_the_tokenizers_end_token_is_no_stop_reason() -> None:
    info = msgspec.structs.replace(INFO, eos_ids=(EOS, EOS + 1), eos_id=EOS)
    told = read_wishes(completion(stop_token_ids=[5]), info, 5)
    assert (told.told_stop_ids, told.sampling.stop_token_ids) == ({5, EOS + 1}, (5, EOS, EOS + 1))
    assert read_wishes(completion(stop_token_ids=[5], ignore_eos=True), info, 5).told_stop_ids == {5}


def test_eos_ends_unless_it_is_ignored() -> None:
    assert wishes(stop_token_ids=[5]).sampling.stop_token_ids == (5, EOS)
    assert wishes(stop_token_ids=[5], ignore_eos=True).sampling.stop_token_ids == (5,)


def test_biases_beyond_the_largest_are_the_largest() -> None:
    assert wishes(logit_bias={"3": 101, "4": -1e30, "5": 2}).sampling.logit_bias == {3: 100, 4: -100, 5: 2}


def test_whole_numbers_may_be_written_with_a_point() -> None:
    given = wishes(max_tokens=4.0, n=2.0, top_k=5.0, seed=7.0, temperature=1.0)
    assert (given.max_tokens, given.n, given.sampling.top_k, given.seed) == (4, 2, 5, 7)
    assert all(type(value) is int for value in (given.max_tokens, given.n, given.sampling.top_k, given.seed))


def test_no_alternatives_need_no_logprobs() -> None:
    assert read_wishes(chat(top_logprobs=0, logprobs=False)[0], INFO, 5).logprobs is None
    with pytest.raises(ApiError, match="top_logprobs needs logprobs"):
        read_wishes(chat(top_logprobs=1)[0], INFO, 5)


def test_max_tokens_defaults_to_16_for_completions_and_to_the_context_for_chat() -> None:
    assert wishes().for_prompt(10, INFO, "prompt").max_tokens == 16
    assert wishes(max_tokens=None).for_prompt(10, INFO, "prompt").max_tokens == 16
    assert read_wishes(chat(max_tokens=None)[0], INFO, 5).for_prompt(10, INFO, "messages").max_tokens == 90
    assert read_wishes(chat()[0], INFO, 5).for_prompt(10, INFO, "messages").max_tokens == 90
    assert read_wishes(chat(max_completion_tokens=7, max_tokens=9)[0], INFO, 5).max_tokens == 7


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(100, 1), (85, 16)])
def test_what_does_not_fit_the_context_is_refused(prompt_len: int, max_tokens: int) -> None:
    with pytest.raises(ApiError, match="maximum context length is 100 tokens") as caught:
        wishes(max_tokens=max_tokens).for_prompt(prompt_len, INFO, "prompt")
    assert caught.value.body.error.code == "context_length_exceeded"


def test_samples_differ_in_their_index_only() -> None:
    two = wishes(n=2)
    base = two.for_prompt(1, INFO, "prompt")
    assert msgspec.structs.replace(two.sample(base, 1), sample_index=0) == two.sample(base, 0)


@pytest.mark.parametrize(
    ("prompt", "count"), [("ab", 1), (["ab", "c"], 2), ([1, 2], 1), ([[1, 2], [3]], 2), (["ab", [3]], 2)]
)
def test_prompts_come_in_four_shapes(prompt: Any, count: int) -> None:
    prompts = PROMPTS.of_completion(completion(prompt=prompt))
    assert len(prompts) == count
    assert all(each.hashes == pack_hashes(hash_chain(each.ids)) for each in prompts)


@pytest.mark.parametrize("prompt", ["", [], [[]], [300], [-1], [1, "x"], "x" * 100])
def test_a_prompt_that_can_not_be_continued_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        PROMPTS.of_completion(completion(prompt=prompt))
    assert caught.value.body.error.param == "prompt"


def test_a_hopelessly_long_text_is_refused_before_it_is_tokenised() -> None:
    with pytest.raises(ApiError, match="maximum context length"):
        PROMPTS.of_completion(completion(prompt="x" * 10_000_000))


def tokenize(**fields: Any) -> tuple[TokenizeRequest, dict[str, Any]]:
    return parse(json.dumps(fields).encode(), TokenizeRequest)[:2]


@pytest.mark.parametrize("max_model_len", [100, 2**30])
def test_a_text_that_is_only_to_be_tokenised_is_bounded_too(max_model_len: int) -> None:
    text = "x" * (MAX_TOKENIZED_CHARS + 1)
    prompts = Prompts(TOKENIZER, TEMPLATE, msgspec.structs.replace(INFO, max_model_len=max_model_len))
    for fields in ({"prompt": text}, {"messages": [{"role": "user", "content": text}]}):
        with pytest.raises(ApiError) as caught:
            prompts.of_tokenize(*tokenize(**fields))
        assert (caught.value.status, caught.value.body.error.param) == (400, *fields)


def test_what_is_tokenised_may_be_longer_than_the_context_and_is_written_in_a_thread() -> None:
    def write(ids: list[int], pieces: list[str] | None) -> tuple[int, list[str] | None, bool]:
        return len(ids), pieces, threading.current_thread() is threading.main_thread()

    request = tokenize(prompt="x" * 6000, return_token_strs=True)
    assert asyncio.run(PROMPTS.tokenize(*request, write)) == (6000, ["x"] * 6000, False)


def test_a_conversation_is_rendered_and_the_final_message_may_be_continued() -> None:
    def rendered(**fields: Any) -> str:
        return TOKENIZER.decode(PROMPTS.of_chat(*chat(**fields)).ids.tolist())

    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}]}]
    assert rendered() == "[user]hi>"
    assert rendered(messages=parts) == "[user]a\nb>"
    prefilled = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure,"}]
    assert (
        rendered(messages=prefilled, add_generation_prompt=False, continue_final_message=True)
        == "[user]hi[assistant]Sure,"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"content": "no role"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    ],
)
def test_messages_that_are_not_text_are_refused(messages: Any) -> None:
    with pytest.raises(ApiError) as caught:
        PROMPTS.of_chat(*chat(messages=messages))
    assert str(caught.value.body.error.param).startswith("messages")


class Stops:
    """A stream that can be stopped."""

    def __init__(self) -> None:
        self.stopped: list[int] = []

    def stop(self, index: int) -> Finished | None:
        self.stopped.append(index)
        return Finished((1, 1), Outcome.STOP, Ledger(cached_tokens=3), 9)


def output(tokens: list[int], outcome: Outcome | None = None, **fields: Any) -> Output:
    result = Output()
    result.tokens = tokens
    result.logprobs = [TokenLogprobs(-1.0, 1, ((token, -1.0),)) for token in tokens]
    if outcome is not None:
        result.finished = Finished((1, 1), outcome, Ledger(), len(tokens), **fields)
    return result


def choice(**fields: Any) -> Choice:
    wanted = wishes(**fields)
    (prompt,) = PROMPTS.of_completion(completion())
    return Choice(0, prompt, wanted.for_prompt(1, INFO, "prompt"), wanted, TOKENIZER)


def test_an_output_keeps_the_space_behind_its_prompt() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"▁the": 0, "▁a": 1, "▁cat": 2}))
    backend.decoder = decoders.Metaspace()
    tokenizer, request = Tokenizer(backend), completion(prompt=[0], echo=True)
    wanted = read_wishes(request, INFO, 5)
    (prompt,) = Prompts(tokenizer, None, INFO).of_completion(request)
    stream = Choice(0, prompt, wanted.for_prompt(1, INFO, "prompt"), wanted, tokenizer)
    delta = stream.take(output([1, 2], Outcome.LENGTH), Stops())
    answer = CompletionFormat("small", wanted, tokenizer).whole([(stream, delta)], Usage(1, 3, 2), Ledger())
    assert (delta.text, answer.choices[0].text) == (" a cat", "the a cat")


def test_eos_counts_but_is_not_text() -> None:
    delta = choice(skip_special_tokens=False).take(output([*ids("a"), EOS], Outcome.STOP), Stops())
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == (
        "a",
        [*ids("a"), EOS],
        "stop",
        None,
    )


def test_a_clients_stop_token_is_the_reason_and_may_be_included() -> None:
    (b,) = ids("b")
    plain = choice(stop_token_ids=[b]).take(output(ids("ab"), Outcome.STOP), Stops())
    kept = choice(stop_token_ids=[b], include_stop_str_in_output=True).take(output(ids("ab"), Outcome.STOP), Stops())
    assert (plain.text, plain.stop_reason, kept.text) == ("a", b, "ab")


def test_a_stop_string_ends_the_stream_and_drops_what_follows() -> None:
    stops, stream = Stops(), choice(stop="END")
    first = stream.take(output(ids("aEN")), stops)
    second = stream.take(output(ids("Dxyz")), stops)
    assert (first.text, first.finish_reason) == ("a", None)
    assert (second.text, second.finish_reason, second.stop_reason) == ("", "stop", "END")
    assert (stops.stopped, stream.num_tokens, second.token_ids) == ([0], 4, ids("D"))
    assert len(second.logprobs) == 1
    assert stream.ledger.cached_tokens == 3
    assert stream.cached_tokens == 1, "never more than the prompt has"


def test_held_text_comes_out_at_the_end() -> None:
    delta = choice(stop="END").take(output(ids("aEN"), Outcome.LENGTH), Stops())
    assert (delta.text, delta.finish_reason) == ("aEN", "length")


@pytest.mark.parametrize(
    ("outcome", "code", "status"),
    [
        (Outcome.REJECTED, RejectCode.QUEUE_FULL, 429),
        (Outcome.REJECTED, RejectCode.NO_WORKERS, 503),
        (Outcome.REJECTED, RejectCode.TOO_LONG, 400),
        (Outcome.TIMEOUT, "", 504),
        (Outcome.FAILED, "", 500),
        (Outcome.IMPOSSIBLE, "", 400),
        (Outcome.ABORTED, "", 503),
    ],
)
def test_a_stream_that_ends_badly_is_an_error(outcome: Outcome, code: str, status: int) -> None:
    error = outcome_error(Finished((1, 1), outcome, Ledger(), 0, "why", code, 2.0))
    assert error is not None
    assert (error.status, error.body.error.message) == (status, "why")
    assert ("Retry-After" in error.headers) == (status in (429, 503))


class Threads(CompletionFormat):
    """Notes where an answer is written."""

    def whole(self, *args: Any) -> Completion:
        self.main = threading.current_thread() is threading.main_thread()
        return super().whole(*args)


@pytest.mark.parametrize(("fields", "main"), [({}, True), ({"logprobs": 0}, False), ({"prompt_logprobs": 0}, False)])
def test_a_whole_answer_with_log_probabilities_is_written_in_a_thread(fields: dict[str, Any], main: bool) -> None:
    wanted = wishes(**fields)
    format = Threads("small", wanted, TOKENIZER)
    unused: Any = None
    generator = Generator(unused, PROMPTS, unused, unused, INFO, 5)
    asyncio.run(generator.whole(Job([], wanted, format, StreamOptions(), False, 0.0)))
    assert format.main == main


def test_logprobs_of_completions_have_four_lists() -> None:
    format = CompletionFormat("small", wishes(logprobs=1), TOKENIZER)
    delta = Delta("ab", ids("ab"), output(ids("ab")).logprobs, "length")
    answer = json.loads(encode(format.whole([(choice(), delta)], Usage(1, 3, 2), Ledger(transport="shm"))))
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"a": -1.0}, {"b": -1.0}],
    }
    assert answer["baton_ledger"] == {"transport": "shm"}


def test_logprobs_of_chat_carry_the_bytes_of_tokens_that_are_half_a_character() -> None:
    wanted = read_wishes(chat(logprobs=True, top_logprobs=1)[0], INFO, 5)
    half = ids("é")[0]
    delta = Delta("", [half], [TokenLogprobs(float("-inf"), 7, ((half, -0.5),))])
    _, chunk = ChatFormat("small", wanted, TOKENIZER).chunks(choice(), delta, True, None)
    (entry,) = json.loads(encode(chunk))["choices"][0]["logprobs"]["content"]
    assert (entry["bytes"], entry["logprob"]) == ([0xC3], -9999.0)
    assert entry["top_logprobs"] == [{"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]}]
