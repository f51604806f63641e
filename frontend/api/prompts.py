"""Prompts of requests to token ids, in threads: templates and tokenisers would hold the event loop up."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.api.params import check_vocabulary, context_room, output_tokens
from baton.frontend.api.requests import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from baton.frontend.chat_template import ChatTemplate, ChatTemplateError
from baton.frontend.model_info import ModelInfo
from baton.frontend.tokenizer import Side, Tokenizer
from baton.proto.hashing import hash_chain, pack_hashes

T = TypeVar("T")

SHORT_IDS = 4096
"""So many token ids are checked and hashed in half a millisecond, most of it with the interpreter's lock held."""

MAX_SALT = 1024
"""Characters of a cache_salt: the roots that salts make are remembered."""

MAX_TOKENIZED_CHARS = 4 * 2**20
"""Of a text that is not to be continued: some seconds of a thread, and ten times as much JSON when each is a token."""

_TEXT_PARTS = ("text", "input_text", "output_text")
"""Names that OpenAI's APIs have for a part of a message that is text."""

_FINAL = "\ue000baton\ue001"
"""Stands at the end of the final message while it is rendered, to find where the template goes on behind it."""


@dataclass(frozen=True)
class Prompt:
    """What a stream starts from."""

    ids: np.ndarray  # int32 [prompt_len]
    hashes: bytes
    """Its packed hash chain, root first."""
    text: str | None = None
    """What it was tokenised from; None where that is not what the ids say."""


@dataclass(frozen=True)
class Truncation:
    """How a prompt is cut."""

    count: int
    """Tokens that stay, special ones included."""
    side: Side
    """Where it loses the others."""


class Prompts:
    """Renders and tokenises. Owns its threads; close() ends them."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, info: ModelInfo) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._info = info
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="tokenize")
        # What is computed once, at start and not in somebody's first request.
        _ = tokenizer.max_token_bytes, tokenizer.byte_level

    async def completion(self, request: CompletionRequest) -> list[Prompt]:
        """As of_completion, in a thread, unless there is so little to do that the way there would cost more."""
        if _is_short_ids(request.prompt):
            return self.of_completion(request)
        return await self._run(lambda: self.of_completion(request))

    async def chat(self, request: ChatCompletionRequest, raw: dict[str, Any]) -> Prompt:
        """As of_chat, in a thread."""
        return await self._run(lambda: self.of_chat(request, raw))

    def of_completion(self, request: CompletionRequest) -> list[Prompt]:
        """One prompt per string or list of ids. Raises ApiError."""
        salt = read_salt(request.cache_salt)
        return [self._prompt(ids, "prompt", salt, text) for ids, text in self._completion_ids(request)]

    def of_chat(self, request: ChatCompletionRequest, raw: dict[str, Any]) -> Prompt:
        """The rendered conversation; `raw` is the request as it came. Raises ApiError."""
        return self._prompt(self._chat_ids(request, raw), "messages", read_salt(request.cache_salt))

    async def bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """As of_bad_words, in a thread."""
        return await self._run(lambda: self.of_bad_words(words))

    def of_bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell the words, at the beginning of the output and, where that makes another token,
        behind a space: those that vLLM bans. Raises ApiError for a word that has none."""
        found: list[tuple[int, ...]] = []
        for word in words:
            first = tuple(self.tokenizer.encode(word.lstrip(), add_special_tokens=False))
            spaced = tuple(self.tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
            if not first or not spaced:
                raise bad_request(f"bad_words has {word!r}, which the tokenizer drops.", "bad_words")
            check_vocabulary((*first, *spaced), self._info, "bad_words")
            found.append(first)
            if spaced[0] != first[0] and len(spaced) == len(first):
                found.append(spaced)
        return tuple(dict.fromkeys(found))

    async def tokenize(
        self, request: TokenizeRequest, raw: dict[str, Any], write: Callable[[list[int], list[str] | None], T]
    ) -> T:
        """What `write` makes of the answer to /tokenize, which is long: all of it in a thread. Raises ApiError."""
        return await self._run(lambda: write(*self.of_tokenize(request, raw)))

    def of_tokenize(self, request: TokenizeRequest, raw: dict[str, Any]) -> tuple[list[int], list[str] | None]:
        """Token ids and, when asked for, how the vocabulary spells them. Raises ApiError."""
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("give either prompt or messages.")
        if request.prompt is None:
            text, special, param = self._render(request, raw), request.add_special_tokens is True, "messages"
        else:
            text, special, param = request.prompt, request.add_special_tokens is not False, "prompt"
        if len(text) > MAX_TOKENIZED_CHARS:
            raise bad_request(
                f"the text has {len(text)} characters; at most {MAX_TOKENIZED_CHARS} are tokenised at once. Send it in "
                "parts.",
                param,
            )
        ids = self.tokenizer.encode(text.encode(errors="replace").decode(), special)
        return ids, [self.tokenizer.piece(id) or "" for id in ids] if request.return_token_strs else None

    async def detokenize(self, ids: list[int]) -> str:
        """Text for /detokenize. Raises ApiError."""
        self._check_ids(ids, "tokens")
        return await self._run(lambda: self.tokenizer.decode(ids, skip_special_tokens=False))

    def close(self) -> None:
        """End the threads; what they do now is abandoned."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Tokenising, or the like, that somebody else describes."""
        return await self._run(work)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _prompt(self, ids: list[int], param: str, salt: tuple[str, ...], text: str | None = None) -> Prompt:
        if not ids:
            raise bad_request("the prompt is empty; it needs at least one token.", param)
        context_room(len(ids), self._info, param)
        tokens = np.array(ids, dtype=np.int32)
        check_vocabulary((int(tokens.max()),), self._info, param)
        return Prompt(tokens, pack_hashes(hash_chain(tokens, *salt)), text)

    def _completion_ids(self, request: CompletionRequest) -> list[tuple[list[int], str | None]]:
        """Ids of each prompt, and its text where the ids are all of that."""
        special = request.add_special_tokens is not False
        cut = self._cut(request)
        prompt = request.prompt
        if not prompt:
            raise bad_request("the prompt is empty; it needs at least one token.", "prompt")

        def read(item: Any) -> tuple[list[int], str | None]:
            if isinstance(item, str):
                return self._encode(item, special, "prompt", cut), item if cut is None else None
            return _keep(self._check_ids(item, "prompt"), cut), None

        if isinstance(prompt, str) or all(isinstance(item, int) for item in prompt):
            return [read(prompt)]
        return [read(item) for item in prompt]

    def _chat_ids(self, request: ChatCompletionRequest, raw: dict[str, Any]) -> list[int]:
        cut = self._cut(request)
        text = self._render(request, raw, cut)
        return self._encode(text, request.add_special_tokens is True, "messages", cut)

    def _cut(self, request: CompletionRequest | ChatCompletionRequest) -> Truncation | None:
        """How prompts are to be cut; None: not at all. Raises ApiError."""
        count = request.truncate_prompt_tokens
        if count is None:
            return None
        limit = self._info.max_model_len
        if count == -1:
            count = limit - max(output_tokens(request) or 1, 1)
        if not 0 < count < limit:
            raise bad_request(
                f"truncate_prompt_tokens must be from 1 to {limit - 1}, or -1 for as many as fit, got "
                f"{request.truncate_prompt_tokens} with max_tokens {output_tokens(request)}.",
                "truncate_prompt_tokens",
            )
        return Truncation(count, request.truncation_side or "left")

    def _encode(self, text: str, add_special_tokens: bool, param: str, cut: Truncation | None = None) -> list[int]:
        """Refuses text that can't fit before it costs the time to tokenise it."""
        self._check_room(len(text.encode(errors="surrogatepass")), param, cut)
        text = text.encode(errors="replace").decode()
        if cut is None:
            return self.tokenizer.encode(text, add_special_tokens)
        return self.tokenizer.encode_truncated(text, add_special_tokens, cut.count, cut.side)

    def _check_room(self, num_bytes: int, param: str, cut: Truncation | None = None) -> None:
        if cut is None:
            context_room(num_bytes // self.tokenizer.max_token_bytes, self._info, param)

    def _check_ids(self, ids: Any, param: str) -> list[int]:
        if not isinstance(ids, list) or not all(isinstance(id, int) for id in ids):
            raise bad_request("prompt must be a string, a list of strings, of token ids or of lists of those.", param)
        check_vocabulary(ids, self._info, param)
        return ids

    def _render(
        self, request: ChatCompletionRequest | TokenizeRequest, raw: dict[str, Any], cut: Truncation | None = None
    ) -> str:
        if self._template is None:
            raise bad_request(
                "this model has no chat template: start the server with --chat-template, or use /v1/completions",
                "messages",
            )
        if request.continue_final_message and request.add_generation_prompt and "add_generation_prompt" in raw:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
            )
        messages = _messages(request, raw)
        # What can't fit is refused before it costs the time to render it; templates write something for each message.
        self._check_room(sum(map(_text_bytes, messages)), "messages", cut)
        context_room(len(messages), self._info, "messages")
        variables = request.chat_template_kwargs or {}
        if isinstance(request, ChatCompletionRequest) and request.documents:
            variables = {"documents": request.documents, **variables}
        if isinstance(request, ChatCompletionRequest) and (effort := request.reasoning_effort) is not None:
            variables = {"reasoning_effort": effort, "enable_thinking": effort != "none", **variables}
        if request.tools:
            variables = {"tools": raw["tools"], **variables}
        try:
            if not request.continue_final_message:
                return self._template.render(
                    messages, add_generation_prompt=request.add_generation_prompt, variables=variables
                )
            final = {**messages[-1], "content": f"{_text(messages[-1])}{_FINAL}"}
            text = self._template.render([*messages[:-1], final], add_generation_prompt=False, variables=variables)
        except ChatTemplateError as error:
            raise bad_request(str(error), "messages") from error
        return text.rpartition(_FINAL)[0]


def _keep(ids: list[int], cut: Truncation | None) -> list[int]:
    if cut is None:
        return ids
    return ids[-cut.count :] if cut.side == "left" else ids[: cut.count]


def read_salt(given: str | None) -> tuple[str, ...]:
    """What keeps a prompt's blocks apart from those of others: extra keys of its hash chain. Raises ApiError."""
    if given == "":
        raise bad_request("cache_salt must not be empty; leave it out to share cached prompts.", "cache_salt")
    if given is not None and len(given) > MAX_SALT:
        raise bad_request(f"cache_salt has {len(given)} characters; at most {MAX_SALT} are possible.", "cache_salt")
    return () if given is None else (given,)


def _is_short_ids(prompt: Any) -> bool:
    return len(prompt) <= SHORT_IDS and not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt)


def _messages(request: ChatCompletionRequest | TokenizeRequest, raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages for the template, after a look at what they contain."""
    if not request.messages:
        raise bad_request("messages must not be empty.", "messages")
    for index, message in enumerate(request.messages):
        for part in message.content if isinstance(message.content, list) else ():
            if part.type not in _TEXT_PARTS or part.text is None:
                raise unsupported_part(index, part.type)
    return [_with_parsed_arguments(_with_reasoning(message)) for message in raw["messages"]]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Clients send reasoning back under either of its names; templates read one of them."""
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    return {**message, "reasoning": reasoning, "reasoning_content": reasoning} if reasoning else message


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Clients send a call's arguments as a JSON string; templates write them down as an object."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"a tool call's arguments are not JSON: {error}", "messages") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _text_bytes(message: dict[str, Any]) -> int:
    """UTF-8 bytes of its text at least; templates may strip blanks around it."""
    return len(_text(message).strip().encode(errors="surrogatepass"))


def unsupported_part(index: int, kind: str) -> ApiError:
    """A content part that is not text."""
    return bad_request(
        f"messages[{index}] has a content part of type {kind!r}; this model takes parts of type 'text' only.",
        f"messages[{index}].content",
    )
