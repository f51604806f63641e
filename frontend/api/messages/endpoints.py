"""The endpoints of /v1/messages."""

import time
from typing import Any

from baton.frontend.api.errors import ApiError
from baton.frontend.api.generation import Generator, Job
from baton.frontend.api.messages.answer import MessageAnswer
from baton.frontend.api.messages.objects import TokenCount
from baton.frontend.api.messages.requests import CountTokensRequest, MessagesRequest
from baton.frontend.api.messages.translate import in_our_names, to_chat
from baton.frontend.api.params import check_model
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.requests import ChatCompletionRequest, read
from baton.frontend.api.responses import encode
from baton.frontend.api.run import running, within_context
from baton.frontend.http_io import EventStream, Receive, Scope, Send, answer_or_disconnect, json_answer, wants_ledger
from baton.frontend.model_info import ModelInfo
from baton.frontend.reading import RequestReader
from baton.proto.config import FrontendConfig


class MessagesApi:
    """The endpoints."""

    def __init__(
        self, config: FrontendConfig, reader: RequestReader, generator: Generator, prompts: Prompts, info: ModelInfo
    ) -> None:
        self._config = config
        self._reader = reader
        self._generator = generator
        self._prompts = prompts
        self._info = info

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a conversation, in Anthropic's way."""
        received_s = time.monotonic()
        wanted, raw = await self._reader.read(MessagesRequest, scope, receive)
        with_ledger = wants_ledger(scope)
        chat, request = self._chat(wanted, raw)
        try:
            asked = await self._generator.prepare(request, chat, with_ledger=with_ledger, received_s=received_s)
        except ApiError as error:
            raise in_our_names(error) from error
        job = within_context(asked, self._info, "messages")
        model = wanted.model or self._info.names[0]
        prompt_len = len(job.prompts[0].ids)
        answer = MessageAnswer(model, prompt_len, fills_context=job is not asked, with_ledger=with_ledger)
        if wanted.stream:
            with running(self._generator, job, answer) as run:
                await EventStream(run, send, self._config.stalled_client_s).run(receive)
        else:
            whole = await answer_or_disconnect(self._whole(job, answer), receive)
            await whole(scope, receive, send)

    async def count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Input tokens that a message would have."""
        wanted, raw = await self._reader.read(CountTokensRequest, scope, receive)
        chat, request = self._chat(wanted, raw)
        prompt = await self._prompts.chat(request, chat)
        answer = json_answer(TokenCount(len(prompt.ids)))
        await answer(scope, receive, send)

    def _chat(
        self, wanted: MessagesRequest | CountTokensRequest, raw: dict[str, Any]
    ) -> tuple[dict[str, Any], ChatCompletionRequest]:
        """As a chat request: its body and what was read from it. Raises ApiError."""
        check_model(wanted.model, self._info)
        chat = to_chat(wanted, raw)
        try:
            return chat, read(chat, ChatCompletionRequest)[0]
        except ApiError as error:
            raise in_our_names(error) from error

    async def _whole(self, job: Job, answer: MessageAnswer) -> bytes:
        with running(self._generator, job, answer) as run:
            await run.whole()
        return encode(answer.message)
