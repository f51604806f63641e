"""A response before its first token: what is to be answered, by which request, and what the client will see of it."""

import time
from dataclasses import dataclass
from typing import Any

from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.api.formats import ChatFormat
from baton.frontend.api.generation import Generator, Job
from baton.frontend.api.params import check_model
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.requests import ChatCompletionRequest, read
from baton.frontend.api.responses_api import translate
from baton.frontend.api.responses_api.answer import ResponseAnswer
from baton.frontend.api.responses_api.items import read_input
from baton.frontend.api.responses_api.objects import ResponsesResponse
from baton.frontend.api.responses_api.requests import (
    InputItem,
    ReasoningConfig,
    ResponsesRequest,
    TextConfig,
    TextFormat,
)
from baton.frontend.api.responses_api.store import Live, ResponseStore, new_response_id
from baton.frontend.api.responses_api.window import Messages, fitting
from baton.frontend.api.run import within_context
from baton.frontend.model_info import ModelInfo
from baton.proto.messages import SamplingParams


@dataclass(frozen=True)
class Draft:
    """A response that is about to run."""

    tenant: str
    response: ResponsesResponse
    items: list[InputItem]
    """What it answers: everything that was said before, and the input."""
    job: Job
    answer: ResponseAnswer


class Drafts:
    """Makes them. `owner` is this frontend's index, which goes into their ids."""

    def __init__(
        self, store: ResponseStore, owner: int, generator: Generator, prompts: Prompts, info: ModelInfo
    ) -> None:
        self._store = store
        self._owner = owner
        self._generator = generator
        self._prompts = prompts
        self._info = info

    async def make(
        self, wanted: ResponsesRequest, raw: dict[str, Any], tenant: str, with_ledger: bool, received_s: float
    ) -> Draft:
        """Check, render and tokenise. Raises ApiError."""
        translate.check(wanted)
        if wanted.background:
            self._store.check_background()
        items = self.items(wanted, tenant)
        chat, request = await self.chat(wanted, raw, items)
        try:
            job = await self._generator.prepare(request, chat, with_ledger=with_ledger, received_s=received_s)
        except ApiError as error:
            raise translate.in_our_names(error) from error
        job = within_context(job, self._info, "input")
        response = new_response(new_response_id(self._owner), wanted, job.wishes.sampling, self._info)
        format = job.format
        assert isinstance(format, ChatFormat)
        return Draft(tenant, response, items, job, ResponseAnswer(response, with_ledger, format.spell))

    def items(self, wanted: ResponsesRequest, tenant: str) -> list[InputItem]:
        """What is to be answered: the conversation before, and the input. Raises ApiError."""
        given = read_input(wanted.input)
        if wanted.previous_response_id is None:
            return given
        try:
            before = self._store.get(wanted.previous_response_id, tenant)
        except ApiError as error:
            text = f"Previous response with id '{wanted.previous_response_id[:64]}' not found."
            raise ApiError(
                error.status, text, param="previous_response_id", code="previous_response_not_found"
            ) from error
        if isinstance(before, Live):
            raise bad_request("the previous response has not ended yet.", "previous_response_id")
        return before.conversation() + given

    async def chat(
        self, wanted: ResponsesRequest, raw: dict[str, Any], items: list[InputItem]
    ) -> tuple[dict[str, Any], ChatCompletionRequest]:
        """As a chat request: its body and what was read from it. Raises ApiError."""
        check_model(wanted.model, self._info)
        chat = translate.to_chat(wanted, raw, items)
        try:
            request, _ = read(chat, ChatCompletionRequest)
            if wanted.truncation == "auto":
                chat["messages"] = await fitting(chat["messages"], lambda messages: self._fits(chat, messages))
                request, _ = read(chat, ChatCompletionRequest)
        except ApiError as error:
            raise translate.in_our_names(error) from error
        return chat, request

    async def _fits(self, chat: dict[str, Any], messages: Messages) -> bool:
        body = {**chat, "messages": messages}
        try:
            await self._prompts.chat(read(body, ChatCompletionRequest)[0], body)
        except ApiError as error:
            if error.body.error.code != "context_length_exceeded":
                raise
            return False
        return True


def new_response(id: str, wanted: ResponsesRequest, sampling: SamplingParams, info: ModelInfo) -> ResponsesResponse:
    """Queued in the background, otherwise in progress."""
    text = wanted.text or TextConfig()
    return ResponsesResponse(
        id=id,
        created_at=int(time.time()),
        status="queued" if wanted.background else "in_progress",
        background=wanted.background,
        instructions=wanted.instructions,
        max_output_tokens=wanted.max_output_tokens,
        max_tool_calls=wanted.max_tool_calls,
        metadata=wanted.metadata or {},
        model=wanted.model or info.names[0],
        output=[],
        parallel_tool_calls=wanted.parallel_tool_calls,
        previous_response_id=wanted.previous_response_id,
        prompt_cache_key=wanted.prompt_cache_key,
        reasoning=wanted.reasoning or ReasoningConfig(),
        safety_identifier=wanted.safety_identifier,
        store=wanted.store,
        temperature=sampling.temperature,
        text=TextConfig(format=text.format or TextFormat(type="text"), verbosity=text.verbosity),
        tool_choice="auto" if wanted.tool_choice is None else wanted.tool_choice,
        tools=wanted.tools or [],
        top_logprobs=wanted.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation=wanted.truncation or "disabled",
        user=wanted.user,
    )
