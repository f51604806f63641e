"""A request's wishes, checked and completed with the model's defaults."""

import dataclasses
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.api.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from baton.frontend.beams import num_alternatives
from baton.frontend.model_info import ModelInfo
from baton.proto.messages import SamplingParams

MAX_ID_DIGITS = 10
MAX_STREAMS = 1024
"""Streams that one request may open: prompts times n."""
MAX_PARAMS_BYTES = 16 * 2**20
"""Of all streams' sampling parameters together: each brings its own, and the scheduler reads them all."""
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 4096
"""Of one stop string: text is held back while it may still become one."""
MAX_STOP_IDS = 1024
MAX_BIASED_IDS = 8192
MAX_BIAS = 100.0
"""Larger biases mean no more: this one decides already."""
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BEAMS = 64
MAX_PROMPT_LOGPROBS = 2**20
"""Of one prompt, alternatives included: 8 MB on their way, some ten times as much as JSON."""
MAX_ANSWER_PROMPT_LOGPROBS = 2 * MAX_PROMPT_LOGPROBS
"""Of one answer, which has them for every sample of every prompt."""
MAX_REQUEST_ID = 256
MAX_BEAM_ALTERNATIVES = 1024
"""Next tokens that a worker reports of each beam."""
_NOT_WITH_BEAMS: dict[str, tuple[object, ...]] = {
    "stop": (None, []),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "logprob_token_ids": (None, []),
    "prompt_logprobs": (None,),
    "echo": (False,),
    "min_tokens": (0,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
}
"""What would change the model's probabilities, or has no place in the answer; values that ask for nothing."""
_UINT64 = 2**64 - 1

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Wishes:
    """One request's parameters, apart from its prompts."""

    sampling: SamplingParams
    """Without max_tokens and seed, which for_prompt adds."""
    max_tokens: int | None
    seed: int | None
    """Of every prompt; None: one is drawn for each."""
    n: int
    stop: tuple[str, ...]
    include_stop: bool
    told_stop_ids: frozenset[int]
    """Those that are the answer's stop_reason: the client's own, and the model's apart from its tokenizer's."""
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    return_token_ids: bool
    tokens_as_ids: bool
    """Tokens beside log-probabilities are written token_id:N."""
    logprobs: int | None
    """Alternatives per token to report; None: no logprobs at all."""
    prompt_logprobs: int | None
    """Alternatives per prompt token to report apart from the output's; None: none. An echo has `logprobs` of them."""
    echo: bool
    """A completion begins with its prompt."""
    prefix: str
    """What a chat answer begins with: the message that it continues, when that is to be echoed."""
    length_penalty: float | None
    """Of a beam search with n beams; None: samples are drawn."""
    bad_words: tuple[str, ...]
    """Still as text; `without_words` brings them to the workers."""
    priority: int
    request_id: str | None

    @property
    def per_token(self) -> bool:
        """The client looks at tokens, so that chunks without text say something too."""
        return self.return_token_ids or self.logprobs is not None

    @property
    def has_logprobs(self) -> bool:
        """The answer has log-probabilities, of output or prompt."""
        return self.logprobs is not None or self.prompt_logprobs is not None

    @property
    def prompt_only(self) -> bool:
        """Nothing is asked for but the echo. A token is computed all the same: the prompt's end is its place."""
        return self.max_tokens == 0

    def for_prompt(self, prompt_len: int, info: ModelInfo, param: str) -> SamplingParams:
        """Sampling parameters with the tokens that the context leaves. Raises ApiError when the prompt is too long."""
        room = context_room(prompt_len, info, param)
        if self.max_tokens is None:
            max_tokens = min(room, info.defaults.max_new_tokens or room)
        elif self.max_tokens > room:
            raise bad_request(
                f"max_tokens is too large: {self.max_tokens}. This model's maximum context length is "
                f"{info.max_model_len} tokens and the request has {prompt_len} input tokens ({self.max_tokens} > "
                f"{info.max_model_len} - {prompt_len}). Ask for at most {room}.",
                "max_tokens",
                "context_length_exceeded",
            )
        else:
            max_tokens = max(self.max_tokens, 1)
        if (self.sampling.prompt_logprobs + 1) * prompt_len > MAX_PROMPT_LOGPROBS:
            raise bad_request(
                f"log-probabilities of {prompt_len} prompt tokens with {self.sampling.prompt_logprobs} alternatives "
                f"each are too many: at most {MAX_PROMPT_LOGPROBS} in all. Ask for fewer alternatives, or send the "
                "prompt in parts.",
                "prompt_logprobs",
            )
        return msgspec.structs.replace(
            self.sampling,
            max_tokens=max_tokens,
            min_tokens=min(self.sampling.min_tokens, max_tokens),
            seed=secrets.randbits(64) if self.seed is None else self.seed & _UINT64,
        )

    def check_answer(self, prompt_tokens: int) -> None:
        """Refuse an answer that nobody could hold; `prompt_tokens` are those of all prompts. Raises ApiError."""
        if (self.sampling.prompt_logprobs + 1) * prompt_tokens * self.n > MAX_ANSWER_PROMPT_LOGPROBS:
            raise bad_request(
                f"log-probabilities of {prompt_tokens} prompt tokens with {self.sampling.prompt_logprobs} alternatives "
                f"each, {self.n} times, are too many: at most {MAX_ANSWER_PROMPT_LOGPROBS} in one answer. Send the "
                "prompts one by one, or ask for fewer samples.",
                "prompt_logprobs",
            )

    def check_volume(self, num_prompts: int) -> None:
        """Refuse long lists or forms for many streams. Raises ApiError."""
        streams = num_prompts * self.n
        size = streams * len(msgspec.msgpack.encode(self.sampling))
        if size > MAX_PARAMS_BYTES:
            raise bad_request(
                f"{streams} output streams have {size >> 20} MiB of sampling parameters, at most "
                f"{MAX_PARAMS_BYTES >> 20} are possible: shorten allowed_token_ids, logit_bias, bad_words or the form "
                "of the output, or ask for fewer samples.",
                "n",
            )

    def keeping_special_tokens(self) -> "Wishes":
        """With special tokens in the text, for a parser that looks for them."""
        return dataclasses.replace(self, skip_special_tokens=False)

    def constrained(self, grammar: str, info: ModelInfo) -> "Wishes":
        """With outputs of this grammar; the end token ends them even with ignore_eos."""
        stops = tuple(sorted({*self.sampling.stop_token_ids, *info.eos_ids}))
        sampling = msgspec.structs.replace(self.sampling, grammar=grammar, stop_token_ids=stops)
        return dataclasses.replace(self, sampling=sampling)

    def without_words(self, words: tuple[tuple[int, ...], ...]) -> "Wishes":
        """With the bad words as token ids."""
        return dataclasses.replace(self, sampling=msgspec.structs.replace(self.sampling, bad_words=words))

    def sample(self, params: SamplingParams, index: int) -> SamplingParams:
        """The parameters of the index-th of n samples."""
        return params if index == 0 else msgspec.structs.replace(params, sample_index=index)


def context_room(prompt_len: int, info: ModelInfo, param: str) -> int:
    """Output tokens that fit behind a prompt. Raises ApiError when not even one does."""
    room = info.max_model_len - prompt_len
    if room < 1:
        raise bad_request(
            f"This model's maximum context length is {info.max_model_len} tokens. However, the request has "
            f"{prompt_len} input tokens. Please reduce the length of the prompt.",
            param,
            "context_length_exceeded",
        )
    return room


def check_vocabulary(ids: Sequence[int], info: ModelInfo, param: str) -> None:
    """Raises ApiError for an id that the model has no embedding of, whether a client gives it or a tokenizer that knows
    more tokens than its model."""
    for id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= id < info.vocab_size:
            raise bad_request(f"token id {id} is out of vocabulary; ids are from 0 to {info.vocab_size - 1}.", param)


def read_wishes(request: GenerationRequest, info: ModelInfo, max_logprobs: int) -> Wishes:
    """Check a request against what the server can do. Raises ApiError naming the field."""
    check_model(request.model, info)
    if not info.generates:
        raise bad_request("this model has no language model head: it makes embeddings alone.", "model", "unsupported")
    max_tokens = _max_tokens(request)
    logprobs = _logprobs(request, max_logprobs)
    n = _samples(request)
    prompt_logprobs = _prompt_logprobs(request, max_logprobs)
    echo = request.echo and isinstance(request, CompletionRequest)
    echoed = logprobs if echo and logprobs is not None else -1
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    stop_ids = frozenset(request.stop_token_ids or ())
    _check_stop(stop, stop_ids, info)
    sampling = _sampling(request, info, () if request.ignore_eos else info.eos_ids, logprobs)
    _check_sampling(sampling, max_tokens)
    _check_ids(request, info)
    most = max(echoed, -1 if prompt_logprobs is None else prompt_logprobs)
    return Wishes(
        sampling=msgspec.structs.replace(sampling, prompt_logprobs=most),
        max_tokens=max_tokens,
        seed=None if request.seed == -1 else request.seed,
        n=n,
        stop=stop,
        include_stop=request.include_stop_str_in_output,
        told_stop_ids=stop_ids | _told_eos(request, info),
        skip_special_tokens=request.skip_special_tokens,
        spaces_between_special_tokens=request.spaces_between_special_tokens,
        return_token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        echo=echo,
        prefix=_continued(request) if request.echo else "",
        length_penalty=_length_penalty(request, n, sampling, info),
        bad_words=_bad_words(request),
        priority=_within("priority", request.priority, -(2**31), 2**31 - 1),
        request_id=_request_id(request.request_id),
    )


def check_model(name: str | None, info: ModelInfo) -> None:
    """Raises ApiError (404) for a model that is not served here."""
    if name is not None and name not in info.names:
        raise ApiError(
            404,
            f"The model `{name}` does not exist; this server has {', '.join(info.names)}.",
            param="model",
            code="model_not_found",
        )


def _sampling(
    request: GenerationRequest, info: ModelInfo, eos_ids: tuple[int, ...], logprobs: int | None
) -> SamplingParams:
    defaults = info.defaults
    return SamplingParams(
        max_tokens=0,
        temperature=_or(request.temperature, defaults.temperature),
        top_k=max(0, _within("top_k", _or(request.top_k, defaults.top_k), -1, 2**31 - 1)),
        top_p=_or(request.top_p, defaults.top_p),
        min_p=_or(request.min_p, defaults.min_p),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        min_tokens=request.min_tokens,
        stop_token_ids=tuple(sorted({*eos_ids, *(request.stop_token_ids or ())})),
        logprobs=-1 if logprobs is None else logprobs,
        logit_bias=_logit_bias(request.logit_bias or {}, info.vocab_size),
        allowed_token_ids=tuple(sorted(set(request.allowed_token_ids or ()))),
        logprob_token_ids=tuple(dict.fromkeys(request.logprob_token_ids or ())),
    )


def _or(value: N | None, default: N) -> N:
    return default if value is None else value


def output_tokens(request: GenerationRequest) -> int | None:
    """As many as the request allows, checked for no more than being there."""
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def _max_tokens(request: GenerationRequest) -> int | None:
    value = request.max_tokens
    name = "max_tokens"
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        value, name = request.max_completion_tokens, "max_completion_tokens"
    if value == 0 and request.echo and isinstance(request, CompletionRequest):
        return 0
    if value is not None and value < 1:
        raise bad_request(f"{name} must be at least 1, got {value}.", name)
    return value


def _samples(request: GenerationRequest) -> int:
    n = _within("n", 1 if request.n is None else request.n, 1, 128)
    if request.best_of not in (None, 1, n):
        raise bad_request(
            f"best_of = {request.best_of} is not supported: ask for n = {request.best_of} samples with logprobs and "
            "choose among them, or for use_beam_search.",
            "best_of",
        )
    return n


def _logprobs(request: GenerationRequest, limit: int) -> int | None:
    if isinstance(request, ChatCompletionRequest):
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        name, count = "top_logprobs", (request.top_logprobs or 0) if request.logprobs else None
    else:
        name, count = "logprobs", request.logprobs
    if request.logprob_token_ids:
        count = count or 0
    if count is not None and not 0 <= count <= limit:
        raise bad_request(
            f"{name} must be from 0 to {limit}, got {count}; the server's --max-logprobs sets the limit.", name
        )
    return count


def _prompt_logprobs(request: GenerationRequest, limit: int) -> int | None:
    count = request.prompt_logprobs
    if count is None:
        return None
    if request.stream:
        raise bad_request("prompt_logprobs are not available with stream; ask without it.", "prompt_logprobs")
    if not 0 <= count <= limit:
        raise bad_request(
            f"prompt_logprobs must be from 0 to {limit}, got {count}; the server's --max-logprobs sets the limit.",
            "prompt_logprobs",
        )
    return count


def _continued(request: GenerationRequest) -> str:
    """The text of a chat's last message when the answer is by the same role."""
    if not isinstance(request, ChatCompletionRequest) or not request.messages:
        return ""
    last = request.messages[-1]
    if last.role != "assistant" or not last.content:
        return ""
    return last.content if isinstance(last.content, str) else "\n".join(part.text or "" for part in last.content)


def _length_penalty(request: GenerationRequest, n: int, sampling: SamplingParams, info: ModelInfo) -> float | None:
    """Of a beam search. What it could not honour is refused, because beams follow the model's own probabilities."""
    if not request.use_beam_search:
        return None
    _within("n", n, 1, MAX_BEAMS)
    _within("length_penalty", request.length_penalty, -50, 50)  # a length to its power stays a number
    for name, harmless in _NOT_WITH_BEAMS.items():
        if getattr(request, name) not in harmless:
            raise bad_request(f"{name} is not possible with use_beam_search.", name)
    alternatives = num_alternatives(n, len(sampling.stop_token_ids))
    if alternatives > min(MAX_BEAM_ALTERNATIVES, info.vocab_size):
        raise bad_request(
            f"{n} beams with {len(sampling.stop_token_ids)} tokens that end them compare {alternatives} next tokens of "
            f"each; at most {min(MAX_BEAM_ALTERNATIVES, info.vocab_size)} are possible. Ask for fewer of either.",
            "n",
        )
    return request.length_penalty


def _bad_words(request: GenerationRequest) -> tuple[str, ...]:
    words = tuple(request.bad_words or ())
    _at_most("bad_words", len(words), MAX_BAD_WORDS, "words")
    _at_most("bad_words", max(map(len, words), default=0), MAX_BAD_WORD_CHARS, "characters in one word")
    if not all(word.strip() for word in words):
        raise bad_request("bad_words must not contain an empty word.", "bad_words")
    return words


def _request_id(request_id: str | None) -> str | None:
    if request_id is not None and not (0 < len(request_id) <= MAX_REQUEST_ID and request_id.isprintable()):
        raise bad_request(f"request_id must be 1 to {MAX_REQUEST_ID} printable characters.", "request_id")
    return request_id


def _check_ids(request: GenerationRequest, info: ModelInfo) -> None:
    for name in ("allowed_token_ids", "logprob_token_ids"):
        for id in getattr(request, name) or ():
            _check_token(id, info.vocab_size, name)
    if request.allowed_token_ids == []:
        raise bad_request("allowed_token_ids must not be empty; leave it out to allow all tokens.", "allowed_token_ids")
    _at_most("logprob_token_ids", len(request.logprob_token_ids or ()), MAX_LOGPROB_TOKEN_IDS, "token ids")


def _check_sampling(params: SamplingParams, max_tokens: int | None) -> None:
    _within("temperature", params.temperature, 0, 2**16)
    if not 0 < params.top_p <= 1:
        raise bad_request(f"top_p must be above 0 and at most 1, got {params.top_p}.", "top_p")
    _within("min_p", params.min_p, 0, 1)
    _within("presence_penalty", params.presence_penalty, -2, 2)
    _within("frequency_penalty", params.frequency_penalty, -2, 2)
    if not 0 < params.repetition_penalty < math.inf:
        raise bad_request(
            f"repetition_penalty must be greater than 0, got {params.repetition_penalty}.", "repetition_penalty"
        )
    if params.min_tokens and params.allowed_token_ids and set(params.allowed_token_ids) <= set(params.stop_token_ids):
        raise bad_request("allowed_token_ids has only tokens that end the output: no min_tokens are met.", "min_tokens")
    _within("min_tokens", params.min_tokens, 0, 2**31 - 1)
    if max_tokens is not None and params.min_tokens > max_tokens:
        raise bad_request(f"min_tokens must be from 0 to max_tokens, got {params.min_tokens}.", "min_tokens")


def _check_stop(stop: tuple[str, ...], stop_ids: frozenset[int], info: ModelInfo) -> None:
    _at_most("stop", len(stop), MAX_STOP_STRINGS, "strings")
    _at_most("stop", max(map(len, stop), default=0), MAX_STOP_CHARS, "characters in one string")
    _at_most("stop_token_ids", len(stop_ids), MAX_STOP_IDS, "token ids")
    if "" in stop:
        raise bad_request("stop must not contain an empty string.", "stop")
    for id in stop_ids:
        _check_token(id, info.vocab_size, "stop_token_ids")


def _told_eos(request: GenerationRequest, info: ModelInfo) -> frozenset[int]:
    """End tokens beside the tokenizer's, as of a Llama that awaits a tool's answer: clients tell them apart."""
    return frozenset() if request.ignore_eos or info.eos_id is None else frozenset(info.eos_ids) - {info.eos_id}


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    _at_most("logit_bias", len(bias), MAX_BIASED_IDS, "token ids")
    result = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or len(key) > MAX_ID_DIGITS:
            raise bad_request(f"logit_bias has the key {key!r}; keys must be token ids.", "logit_bias")
        _check_token(int(key), vocab_size, "logit_bias")
        result[int(key)] = max(-MAX_BIAS, min(MAX_BIAS, _within("logit_bias", value, -math.inf, math.inf)))
    return result


def _check_token(id: int, vocab_size: int, param: str) -> None:
    if not 0 <= id < vocab_size:
        raise bad_request(f"{param} has the token id {id}; the vocabulary has ids from 0 to {vocab_size - 1}.", param)


def _at_most(name: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise bad_request(f"{name} has {count} {what}; at most {limit} are possible.", name)


def _within(name: str, value: N, low: float, high: float) -> N:
    """NaN is within nothing."""
    if not low <= value <= high:
        raise bad_request(f"{name} must be from {low} to {high}, got {value}.", name)
    return value
