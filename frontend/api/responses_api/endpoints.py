"""The endpoints of /v1/responses.

A response whose client waits for it, whole or as a stream, is aborted when the client leaves; one in the background has
a task of its own. Those that are to be stored are in the store from their first moment on, where they can be looked at
and cancelled. A store is one frontend's: requests for a response of another one are handed on to it.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.api.generation import Generator
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.responses import encode
from baton.frontend.api.responses_api import objects
from baton.frontend.api.responses_api.answer import ResponseAnswer
from baton.frontend.api.responses_api.draft import Draft, Drafts
from baton.frontend.api.responses_api.requests import ResponsesRequest
from baton.frontend.api.responses_api.store import EventLog, Kept, Live, ResponseStore, owner_of
from baton.frontend.api.run import Run, running
from baton.frontend.api.sse import named_event
from baton.frontend.eager import run_eagerly
from baton.frontend.forward import Forward, peer_socket
from baton.frontend.http_io import EventStream, Receive, Scope, Send, answer_or_disconnect, json_answer, wants_ledger
from baton.frontend.model_info import ModelInfo
from baton.frontend.openapi import describe, query
from baton.frontend.reading import RequestReader
from baton.proto.config import FrontendConfig
from baton.proto.keys import key_name

MAX_PAGE = 100
DEFAULT_PAGE = 20


class ResponsesApi:
    """The endpoints, with this frontend's stored responses."""

    def __init__(
        self, config: FrontendConfig, reader: RequestReader, generator: Generator, prompts: Prompts, info: ModelInfo
    ) -> None:
        self._config = config
        self._reader = reader
        self._generator = generator
        self._prompts = prompts
        self._store = ResponseStore(config.max_stored_responses, config.max_stored_response_bytes)
        self._index = config.peers.index(config.name) if config.peers else 0
        self._drafts = Drafts(self._store, self._index, generator, prompts, info)
        self._tasks: set[asyncio.Task[None]] = set()

    def add_routes(self, app: FastAPI) -> None:
        """Those that have a response's id in their path."""
        one = "/v1/responses/{response_id}"
        whole, pages = describe(None, objects.ResponsesResponse), describe(None, objects.ItemList)
        stream = [query("stream", "boolean"), query("starting_after", "integer")]
        page = [query("limit", "integer"), query("order", "string"), query("after", "string")]
        app.add_api_route(one, self.retrieve, openapi_extra=whole | {"parameters": stream})
        app.add_api_route(f"{one}/cancel", self.cancel, methods=["POST"], openapi_extra=whole)
        gone = describe(None, objects.DeletedResponse)
        app.add_api_route(one, self.delete, methods=["DELETE"], openapi_extra=gone)
        app.add_api_route(f"{one}/input_items", self.input_items, openapi_extra=pages | {"parameters": page})

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a conversation, of which the server may have the beginning."""
        received_s = time.monotonic()
        wanted, raw = await self._reader.read(ResponsesRequest, scope, receive)
        answer: Any
        if (peer := self._elsewhere(wanted.previous_response_id)) is not None:
            answer = Forward(peer, encode(raw))
        else:
            with_ledger = wants_ledger(scope)
            draft = await self._drafts.make(wanted, raw, key_name.get(), with_ledger, received_s)
            if wanted.background:
                answer = self._begin_background(draft, wanted.stream)
            elif wanted.stream:
                with self._running(draft) as run:
                    await EventStream(run, send, self._config.stalled_client_s).run(receive)
                return
            else:
                answer = await answer_or_disconnect(self._whole(draft), receive)
        await answer(scope, receive, send)

    async def count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Input tokens that a response would have."""
        wanted, raw = await self._reader.read(ResponsesRequest, scope, receive)
        answer: Any
        if (peer := self._elsewhere(wanted.previous_response_id)) is not None:
            answer = Forward(peer, encode(raw))
        else:
            items = self._drafts.items(wanted, key_name.get())
            chat, request = await self._drafts.chat(wanted, raw, items)
            prompt = await self._prompts.chat(request, chat)
            answer = json_answer(objects.InputTokens(input_tokens=len(prompt.ids)))
        await answer(scope, receive, send)

    async def retrieve(self, request: Request, response_id: str) -> Response:
        """A stored response as it is now; with `stream=true` its events, of one that was streamed in the background."""
        if (peer := self._elsewhere(response_id)) is not None:
            return Forward(peer)
        found = self._store.get(response_id, key_name.get())
        stream = request.query_params.get("stream", "false").lower()
        if stream not in ("true", "false"):
            raise bad_request("stream must be true or false.", "stream")
        after = _whole_number(request, "starting_after", -1, 0, 2**53)
        if stream == "true":
            if found.log is None:
                raise bad_request("only a response made with background and stream can be streamed again.", "stream")
            return _Followed(found.log, after, self._config.stalled_client_s)
        return json_answer(found.response if isinstance(found, Kept) else found.answer.snapshot())

    async def cancel(self, request: Request, response_id: str) -> Response:
        """End a response that runs; of one that has ended, what became of it."""
        if (peer := self._elsewhere(response_id)) is not None:
            return Forward(peer)
        found = self._store.get(response_id, key_name.get())
        if isinstance(found, Kept):
            return json_answer(found.response)
        _cancel(found.run, found.answer)
        return json_answer(found.answer.snapshot())

    async def delete(self, request: Request, response_id: str) -> Response:
        """Forget a response; one that runs is cancelled."""
        if (peer := self._elsewhere(response_id)) is not None:
            return Forward(peer)
        live = self._store.delete(response_id, key_name.get())
        if live is not None:
            _cancel(live.run, live.answer)
        return json_answer(objects.DeletedResponse(id=response_id))

    async def input_items(self, request: Request, response_id: str) -> Response:
        """What a response answers, a page at a time: the input, and what was said before it."""
        if (peer := self._elsewhere(response_id)) is not None:
            return Forward(peer)
        items = self._store.get(response_id, key_name.get()).input_items()
        limit = _whole_number(request, "limit", DEFAULT_PAGE, 1, MAX_PAGE)
        order, after = request.query_params.get("order", "desc"), request.query_params.get("after")
        if order not in ("asc", "desc"):
            raise bad_request("order must be asc or desc.", "order")
        if order == "desc":
            items = items[::-1]
        if after is not None:
            ids = [item.id for item in items]
            if after not in ids:
                raise bad_request(f"after names {after[:64]!r}, which is not among the items.", "after")
            items = items[ids.index(after) + 1 :]
        page = items[:limit]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return json_answer(objects.ItemList(data=page, first_id=first, last_id=last, has_more=len(items) > limit))

    def _elsewhere(self, response_id: str | None) -> Path | None:
        """The socket of the frontend that has this response; None when it would be here."""
        owner = owner_of(response_id) if response_id else None
        peers = self._config.peers
        if owner is None or owner == self._index or owner >= len(peers):
            return None
        return peer_socket(self._config.run_dir, peers[owner])

    async def _whole(self, draft: Draft) -> bytes:
        with self._running(draft) as run:
            await run.whole()
            return encode(draft.answer.snapshot())

    def _begin_background(self, draft: Draft, stream: bool) -> Response:
        """Let it run; the answer is the response that waits, or its events as they come. Raises ApiError."""
        log = EventLog() if stream else None
        queued = draft.answer.queue()
        if log is not None:
            _append(log, queued, False)
        waiting = draft.answer.snapshot()
        task = run_eagerly(self._in_background(draft, log))
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return json_answer(waiting) if log is None else _Followed(log, -1, self._config.stalled_client_s)

    async def _in_background(self, draft: Draft, log: EventLog | None) -> None:
        with self._running(draft, log) as run:
            try:
                async for events in run.steps():
                    _append(log, events, run.ended)
            except ApiError as error:
                run.end(draft.answer.fail(error))
                _append(log, run.advance(), True)

    @contextmanager
    def _running(self, draft: Draft, log: EventLog | None = None) -> Iterator[Run]:
        """What has not ended at the end of the block is cancelled. Raises ApiError."""
        id = draft.response.id
        with running(self._generator, draft.job, draft.answer) as run:
            if draft.response.store:
                self._store.begin(id, Live(draft.tenant, draft.answer, run, draft.items, log))
            try:
                yield run
            except ApiError:
                self._store.forget(id)
                raise
            finally:
                _cancel(run, draft.answer)
                self._store.end(id)


class _Followed(Response):
    """A background response's events, written as they come; a client that leaves disturbs nobody."""

    def __init__(self, log: EventLog, after: int, stalled_s: float) -> None:
        super().__init__(media_type="text/event-stream")
        self._log, self._after, self._stalled_s = log, after, stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._log.follow(self._after) as events:
            await EventStream(events, send, self._stalled_s).run(receive)


def _cancel(run: Run, answer: ResponseAnswer) -> None:
    if not run.over:
        run.end(answer.cancel())


def _append(log: EventLog | None, events: list[object], ended: bool) -> None:
    if log is not None:
        log.append([named_event(event) for event in events], ended)


def _whole_number(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 17 and low <= int(text) <= high):
        raise bad_request(f"{name} must be a number from {low} to {high}.", name)
    return int(text)
