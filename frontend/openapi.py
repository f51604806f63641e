"""The document at /openapi.json: our message types beside the paths that FastAPI knows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI

from baton.frontend.api.errors import ErrorResponse
from baton.frontend.api.requests import switches
from baton.frontend.routing import OPEN_PATHS, Endpoint


@dataclass(frozen=True)
class Operation:
    """A POST request that we answer ourselves, with the types of what is sent."""

    endpoint: Endpoint
    request: type
    response: type
    events: Any = None
    """Of a streamed answer; None: there is none."""
    error: type = ErrorResponse

    @property
    def types(self) -> list[Any]:
        """All of them."""
        events = [] if self.events is None else [self.events]
        return [self.request, self.response, *events, self.error]

    def describe(self) -> dict[str, Any]:
        """OpenAPI of it."""
        described = describe(self.request, self.response, self.error)
        if self.events is not None:
            described["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        return described


def describe(request_type: type | None, response_type: type, error_type: type = ErrorResponse) -> dict[str, Any]:
    """OpenAPI of one operation."""

    def content(kind: type) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}

    answers = {"200": {"description": "Success"} | content(response_type)}
    answers |= {status: {"description": "Error"} | content(error_type) for status in ("4XX", "5XX")}
    described: dict[str, Any] = {"responses": answers}
    if request_type is not None:
        described["requestBody"] = {"required": True} | content(request_type)
    return described


def query(name: str, kind: str) -> dict[str, Any]:
    """OpenAPI of a parameter in the URL."""
    return {"name": name, "in": "query", "required": False, "schema": {"type": kind}}


def describe_plain(media_type: str | None) -> dict[str, Any]:
    """OpenAPI of an operation without a body: an answer of one type, or an empty one."""
    described = describe(None, ErrorResponse)
    content: dict[str, Any] = {"content": {media_type: {"schema": {}}}} if media_type else {}
    described["responses"]["200"] = {"description": "Success"} | content
    return described


def document(app: FastAPI, posts: Mapping[str, Operation], others: list[Any], *, locked: bool) -> None:
    """Add to what FastAPI generates: the paths that it does not see, and the types of all messages and `others`.

    `locked`: keys are asked for.
    """
    generate = app.openapi
    types = [kind for operation in posts.values() for kind in operation.types]
    _, schemas = msgspec.json.schema_components(
        [*types, *others, ErrorResponse], ref_template="#/components/schemas/{name}"
    )
    for operation in posts.values():
        fields = schemas[operation.request.__name__]["properties"]
        fields |= {name: {"anyOf": [fields[name], {"type": "null"}]} for name in switches(operation.request)}

    def openapi() -> dict[str, Any]:
        full = generate()
        for path, operation in posts.items():
            about = {"summary": operation.endpoint.__doc__, "operationId": path.strip("/").replace("/", "_")}
            full["paths"][path] = {"post": about | operation.describe()}
        full.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        if locked:
            _ask_for_keys(full)
        return _without_validation(full)

    app.openapi = openapi  # type: ignore[method-assign]


def _ask_for_keys(full: dict[str, Any]) -> None:
    """A key in either header, everywhere but on the probes."""
    full["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operations in full["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"bearer": []}, {"x-api-key": []}]


def _without_validation(full: dict[str, Any]) -> dict[str, Any]:
    """FastAPI describes its own answer to parameters of the wrong type; ours are strings, and nothing else."""
    for operations in full["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        full["components"]["schemas"].pop(name, None)
    return full
