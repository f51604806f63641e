"""Errors in Anthropic's shape."""

import msgspec

from baton.frontend.api.errors import ApiError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    type: str
    message: str


class MessagesError(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """Every error of /v1/messages, also as an event."""

    error: ErrorDetail


def of_error(error: ApiError) -> MessagesError:
    """An error as Anthropic's clients know it."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    return MessagesError(ErrorDetail(_TYPES.get(error.status, default), error.body.error.message))


def encode_error(error: ApiError) -> bytes:
    """As JSON."""
    return msgspec.json.encode(of_error(error))
