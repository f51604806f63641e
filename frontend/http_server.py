"""The HTTP API as an ASGI application: FastAPI routes and documents, the endpoints parse and write bytes themselves."""

import hmac
import logging
import time
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from baton.frontend.api import responses
from baton.frontend.api.errors import ApiError, ErrorResponse, http_error, unavailable
from baton.frontend.api.generation import Generator
from baton.frontend.api.params import check_model
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    R,
    TokenizeRequest,
    parse,
)
from baton.frontend.engine_client import EngineClient
from baton.frontend.http_io import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    Receive,
    Scope,
    Send,
    answer_or_disconnect,
    read_body,
)
from baton.frontend.model_info import ModelInfo
from baton.proto.config import FrontendConfig

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Need no key."""


class Api:
    """The endpoints."""

    def __init__(
        self, config: FrontendConfig, client: EngineClient, prompts: Prompts, info: ModelInfo, generator: Generator
    ) -> None:
        self._config = config
        self._client = client
        self._prompts = prompts
        self._info = info
        self._generator = generator
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        received_s = time.monotonic()
        return await self._generate(request, received_s, *await self._parse(request, CompletionRequest))

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        received_s = time.monotonic()
        return await self._generate(request, received_s, *await self._parse(request, ChatCompletionRequest))

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt or of a rendered conversation."""
        wanted, raw = await self._parse(request, TokenizeRequest)
        check_model(wanted.model, self._info)
        ids = await self._prompts.tokenize(wanted, raw)
        pieces = [self._prompts.tokenizer.piece(id) or "" for id in ids] if wanted.return_token_strs else None
        return _json(responses.TokenizeResponse(len(ids), self._info.max_model_len, ids, pieces))

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        wanted, _raw = await self._parse(request, DetokenizeRequest)
        check_model(wanted.model, self._info)
        return _json(responses.DetokenizeResponse(await self._prompts.detokenize(wanted.tokens)))

    async def models(self) -> Response:
        """The names under which the model is served."""
        return _json(responses.ModelList(data=[self._card(name) for name in self._info.names]))

    async def model(self, name: str) -> Response:
        """One of them."""
        check_model(name, self._info)
        return _json(self._card(name))

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
        return _json({"version": version("baton-serve")})

    async def metrics(self) -> Response:
        """The whole cluster's metrics in Prometheus' text format."""
        try:
            text = await self._client.metrics()
        except TimeoutError:
            raise unavailable("the scheduler does not answer") from None
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _generate(
        self, request: Request, received_s: float, wanted: GenerationRequest, raw: dict[str, Any]
    ) -> Response:
        with_ledger = request.headers.get("x-baton-ledger") == "1"
        job = await self._generator.prepare(wanted, raw, with_ledger=with_ledger, received_s=received_s)
        if not wanted.stream:
            return await answer_or_disconnect(self._generator.whole(job), request)
        return await EventStream.begin(self._generator.events(job), request, self._config.stalled_client_s)

    def _card(self, name: str) -> responses.ModelCard:
        root, max_model_len = self._info.names[0], self._info.max_model_len
        return responses.ModelCard(id=name, created=self._created, root=root, max_model_len=max_model_len)

    async def _parse(self, request: Request, kind: type[R]) -> tuple[R, dict[str, Any]]:
        wanted, raw, unknown = parse(await read_body(request, self._config.max_request_bytes), kind)
        if unknown:
            log.warning(
                "fields that are not known were ignored: %s", ", ".join(repr(name[:64]) for name in unknown[:20])
            )
        return wanted, raw


class RequireKey:
    """ASGI middleware: a Bearer key on everything that is not open."""

    def __init__(self, app: Any, keys: tuple[str, ...], root_path: str) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["path"].removeprefix(self._root_path) in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # Every key is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def build_app(
    config: FrontendConfig, client: EngineClient, prompts: Prompts, info: ModelInfo, generator: Generator
) -> Any:
    """The ASGI application."""
    api = Api(config, client, prompts, info, generator)
    # The interactive pages would load scripts from a foreign host; the schema itself stays.
    app = FastAPI(
        title="Baton", version=version("baton-serve"), root_path=config.root_path, docs_url=None, redoc_url=None
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)
    posts = {
        "/v1/completions": (api.completions, CompletionRequest, responses.Completion),
        "/v1/chat/completions": (api.chat_completions, ChatCompletionRequest, responses.ChatCompletion),
        "/tokenize": (api.tokenize, TokenizeRequest, responses.TokenizeResponse),
        "/detokenize": (api.detokenize, DetokenizeRequest, responses.DetokenizeResponse),
    }
    for path, (endpoint, request_type, response_type) in posts.items():
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=_describe(request_type, response_type))
    app.add_api_route("/v1/models", api.models, openapi_extra=_describe(None, responses.ModelList))
    app.add_api_route("/v1/models/{name:path}", api.model, openapi_extra=_describe(None, responses.ModelCard))
    for plain in (api.health, api.ready, api.version, api.metrics):
        app.add_api_route(f"/{plain.__name__}", plain)
    _document(app, [kind for _, *kinds in posts.values() for kind in kinds])
    return RequireKey(app, config.api_keys, config.root_path) if config.api_keys else app


def error_response(error: ApiError) -> Response:
    """The envelope with its status and headers."""
    return Response(error.encode(), error.status, error.headers, "application/json")


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not possible at {request.url.path}",
    }.get(error.status_code, "")
    return error_response(http_error(error.status_code, detail, dict(error.headers or {})))


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_exception(_request: Request, _error: Exception) -> Response:
    """The server logs the traceback; the client learns only that it was not its fault."""
    return error_response(ApiError(500, "internal error; the server's log has the details"))


def _json(body: object) -> Response:
    return Response(responses.encode(body), media_type="application/json")


def _describe(request_type: type | None, response_type: type) -> dict[str, Any]:
    """OpenAPI of one operation."""

    def content(kind: type) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}

    answers = {"200": {"description": "Success"} | content(response_type)}
    answers |= {"4XX": {"description": "Error"} | content(ErrorResponse)}
    described: dict[str, Any] = {"responses": answers}
    if request_type is not None:
        described["requestBody"] = {"required": True} | content(request_type)
    return described


def _document(app: FastAPI, types: list[type]) -> None:
    """Add the message types to what FastAPI generates at /openapi.json."""
    generate = app.openapi
    _, schemas = msgspec.json.schema_components(
        [*types, responses.ModelList, responses.ModelCard, responses.ChatChunk, ErrorResponse],
        ref_template="#/components/schemas/{name}",
    )

    def openapi() -> dict[str, Any]:
        document = generate()
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
