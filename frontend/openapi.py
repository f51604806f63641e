"""The document at /openapi.json: our message types beside the paths that FastAPI knows."""

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI

from baton.frontend.api import responses
from baton.frontend.api.errors import ErrorResponse
from baton.frontend.routing import Endpoint


def describe(request_type: type | None, response_type: type) -> dict[str, Any]:
    """OpenAPI of one operation."""

    def content(kind: type) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}

    answers = {"200": {"description": "Success"} | content(response_type)}
    answers |= {status: {"description": "Error"} | content(ErrorResponse) for status in ("4XX", "5XX")}
    described: dict[str, Any] = {"responses": answers}
    if request_type is not None:
        described["requestBody"] = {"required": True} | content(request_type)
    return described


def describe_plain(media_type: str | None) -> dict[str, Any]:
    """OpenAPI of an operation without a body: an answer of one type, or an empty one."""
    described = describe(None, ErrorResponse)
    content: dict[str, Any] = {"content": {media_type: {"schema": {}}}} if media_type else {}
    described["responses"]["200"] = {"description": "Success"} | content
    return described


def document(app: FastAPI, posts: Mapping[str, tuple[Endpoint, type, type]]) -> None:
    """Add to what FastAPI generates: the paths that it does not see, and the types of all messages.

    `posts`: path -> endpoint, type of the request, type of the response.
    """
    generate = app.openapi
    types = [kind for _, *kinds in posts.values() for kind in kinds]
    _, schemas = msgspec.json.schema_components(
        [*types, responses.ModelList, responses.ModelCard, responses.ChatChunk, ErrorResponse],
        ref_template="#/components/schemas/{name}",
    )

    def openapi() -> dict[str, Any]:
        full = generate()
        for path, (endpoint, request_type, response_type) in posts.items():
            operation = {"summary": endpoint.__doc__, "operationId": path.strip("/").replace("/", "_")}
            full["paths"][path] = {"post": operation | describe(request_type, response_type)}
        full.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return _without_validation(full)

    app.openapi = openapi  # type: ignore[method-assign]


def _without_validation(full: dict[str, Any]) -> dict[str, Any]:
    """FastAPI describes its own answer to parameters of the wrong type; ours are strings, and nothing else."""
    for operations in full["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        full["components"]["schemas"].pop(name, None)
    return full
