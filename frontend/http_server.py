"""The HTTP API as an ASGI application: the endpoints parse and write bytes themselves.

What generates text, or takes it apart, is plain ASGI behind one look-up (routing.Posts); the rest, and the document
that describes everything, is FastAPI's.
"""

import logging
import time
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton.frontend.api import responses
from baton.frontend.api.embedding_endpoints import EmbeddingsApi
from baton.frontend.api.embeddings import Embedder
from baton.frontend.api.errors import ApiError, http_error, unavailable
from baton.frontend.api.generation import Generator
from baton.frontend.api.messages.endpoints import MessagesApi
from baton.frontend.api.messages.errors import MessagesError
from baton.frontend.api.messages.objects import Message, MessageEvent, TokenCount
from baton.frontend.api.messages.requests import CountTokensRequest, MessagesRequest
from baton.frontend.api.params import check_model
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from baton.frontend.api.responses_api.endpoints import ResponsesApi
from baton.frontend.api.responses_api.objects import (
    DeletedResponse,
    InputTokens,
    ItemList,
    ResponsesResponse,
    StreamEvent,
)
from baton.frontend.api.responses_api.requests import ResponsesRequest
from baton.frontend.cors import allow_origins
from baton.frontend.engine_client import EngineClient
from baton.frontend.http_io import EventStream, Receive, Scope, Send, answer_or_disconnect, json_answer, wants_ledger
from baton.frontend.model_info import ModelInfo
from baton.frontend.openapi import Operation, describe, describe_plain, document
from baton.frontend.reading import RequestReader
from baton.frontend.routing import Posts, RequireKey, error_response, internal_error
from baton.proto.config import FrontendConfig
from baton.proto.keys import Keyring

log = logging.getLogger(__name__)


class Api:
    """The endpoints."""

    def __init__(
        self,
        config: FrontendConfig,
        reader: RequestReader,
        client: EngineClient,
        prompts: Prompts,
        info: ModelInfo,
        generator: Generator,
    ) -> None:
        self._config = config
        self._client = client
        self._prompts = prompts
        self._info = info
        self._generator = generator
        self._reader = reader
        self._created = int(time.time())

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Continue prompts."""
        await self._generate(CompletionRequest, scope, receive, send)

    async def chat_completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a conversation."""
        await self._generate(ChatCompletionRequest, scope, receive, send)

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Token ids of a prompt or of a rendered conversation."""
        wanted, raw = await self._reader.read(TokenizeRequest, scope, receive)
        check_model(wanted.model, self._info)

        def written(ids: list[int], pieces: list[str] | None) -> bytes:
            return responses.encode(responses.TokenizeResponse(len(ids), self._info.max_model_len, ids, pieces))

        answer = json_answer(await self._prompts.tokenize(wanted, raw, written))
        await answer(scope, receive, send)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Text of token ids."""
        wanted, _raw = await self._reader.read(DetokenizeRequest, scope, receive)
        check_model(wanted.model, self._info)
        answer = json_answer(responses.DetokenizeResponse(await self._prompts.detokenize(wanted.tokens)))
        await answer(scope, receive, send)

    async def models(self) -> Response:
        """The names under which the model is served."""
        return json_answer(responses.ModelList(data=[self._card(name) for name in self._info.names]))

    async def model(self, name: str) -> Response:
        """One of them."""
        check_model(name, self._info)
        return json_answer(self._card(name))

    async def health(self) -> Response:
        """200 while the process lives."""
        return Response()

    async def ready(self) -> Response:
        """200 once a request can be served, else 503 with what is missing."""
        if self._generator.draining:
            raise unavailable("the server is shutting down")
        if reason := self._client.unready_reason:
            raise unavailable(f"not ready: {reason}")
        return Response()

    async def version(self) -> Response:
        """The server's version."""
        return json_answer({"version": version("baton-serve")})

    async def metrics(self) -> Response:
        """The whole cluster's metrics in Prometheus' text format."""
        try:
            text = await self._client.metrics()
        except TimeoutError:
            raise unavailable("the scheduler does not answer") from None
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _generate(
        self, kind: type[CompletionRequest] | type[ChatCompletionRequest], scope: Scope, receive: Receive, send: Send
    ) -> None:
        received_s = time.monotonic()
        wanted, raw = await self._reader.read(kind, scope, receive)
        if wanted.request_id is None:
            wanted.request_id = scope["state"]["request_id"]  # what the answer is called
        with_ledger = wants_ledger(scope)
        job = await self._generator.prepare(wanted, raw, with_ledger=with_ledger, received_s=received_s)
        if wanted.stream:
            with self._generator.events(job) as events:
                await EventStream(events, send, self._config.stalled_client_s).run(receive)
        else:
            answer = await answer_or_disconnect(self._generator.whole(job), receive)
            await answer(scope, receive, send)

    def _card(self, name: str) -> responses.ModelCard:
        root, max_model_len = self._info.names[0], self._info.max_model_len
        return responses.ModelCard(id=name, created=self._created, root=root, max_model_len=max_model_len)


def build_app(
    config: FrontendConfig,
    client: EngineClient,
    prompts: Prompts,
    info: ModelInfo,
    generator: Generator,
    embedder: Embedder,
) -> Any:
    """The ASGI application."""
    reader = RequestReader(config)
    api = Api(config, reader, client, prompts, info, generator)
    stateful = ResponsesApi(config, reader, generator, prompts, info)
    messages = MessagesApi(config, reader, generator, prompts, info)
    # The interactive pages would load scripts from a foreign host; the schema itself stays.
    app = FastAPI(
        title="Baton", version=version("baton-serve"), root_path=config.root_path, docs_url=None, redoc_url=None
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_exception)
    app.add_api_route("/v1/models", api.models, openapi_extra=describe(None, responses.ModelList))
    app.add_api_route("/v1/models/{name:path}", api.model, openapi_extra=describe(None, responses.ModelCard))
    plain = {api.health: None, api.ready: None, api.version: "application/json", api.metrics: "text/plain"}
    for endpoint, media_type in plain.items():
        path, extra = f"/{endpoint.__name__}", describe_plain(media_type)
        app.add_api_route(path, endpoint, response_class=Response, openapi_extra=extra)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    stateful.add_routes(app)
    posts = {
        "/v1/completions": Operation(api.completions, CompletionRequest, responses.Completion, responses.Completion),
        "/v1/chat/completions": Operation(
            api.chat_completions, ChatCompletionRequest, responses.ChatCompletion, responses.ChatChunk
        ),
        "/v1/responses": Operation(stateful.create, ResponsesRequest, ResponsesResponse, StreamEvent),
        "/v1/responses/input_tokens": Operation(stateful.count, ResponsesRequest, InputTokens),
        "/v1/messages": Operation(messages.create, MessagesRequest, Message, MessageEvent, MessagesError),
        "/v1/messages/count_tokens": Operation(messages.count, CountTokensRequest, TokenCount, error=MessagesError),
        "/tokenize": Operation(api.tokenize, TokenizeRequest, responses.TokenizeResponse),
        "/detokenize": Operation(api.detokenize, DetokenizeRequest, responses.DetokenizeResponse),
        **EmbeddingsApi(reader, embedder).operations(),
    }
    keys = Keyring(config.api_keys, config.api_key_file)
    document(app, posts, [responses.ModelList, ItemList, DeletedResponse], locked=bool(keys))
    whole = Posts(app, {path: operation.endpoint for path, operation in posts.items()}, config.root_path)
    locked = RequireKey(whole, keys, config.root_path) if keys else whole
    return allow_origins(locked, config.cors)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.url.path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not possible at {request.url.path}",
    }.get(error.status_code, "")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_at(request))
    return error_response(http_error(error.status_code, detail, headers), request.url.path)


def _methods_at(request: Request) -> list[str]:
    """What is possible at a path, by any of its routes."""
    path = request.scope["path"].removeprefix(request.app.root_path)
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return sorted({method for route in routes for method in route.methods or ()})


async def _on_exception(request: Request, _error: Exception) -> Response:
    return error_response(internal_error(), request.url.path)
