"""One error envelope for everything a client can do wrong or suffer."""

from http import HTTPStatus

import msgspec

from baton.frontend.instructions import Finished
from baton.proto.lifecycle import Outcome, RejectCode

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_REJECT_STATUS = {
    RejectCode.QUEUE_FULL: 429,
    RejectCode.TOO_LONG: 400,
    RejectCode.NO_WORKERS: 503,
    RejectCode.DEADLINE: 503,
    RejectCode.SHUTTING_DOWN: 503,
}
_DEFAULT_RETRY_AFTER_S = 1
MAX_MESSAGE = 1500
"""Characters of an error's text, which may quote what a client sent; JSON may need six bytes for each."""
MAX_NAME = 200
"""Characters of its param and code."""


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request that is wrong."""
    code: str | None


class ErrorResponse(msgspec.Struct, frozen=True):
    """Every error of every endpoint has this form."""

    error: ErrorBody


class ApiError(Exception):
    """An answer other than success. The message is for the client: what is wrong and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = _bounded(message, MAX_MESSAGE)
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        names = [name and _bounded(name, MAX_NAME) for name in (param, code)]
        self.body = ErrorResponse(ErrorBody(message, error_type(status), *names))

    def encode(self) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(self.body)


def renamed(error: ApiError, names: dict[str, str]) -> ApiError:
    """The same error for a client that knows a field by another name: `names` has the new one of some."""
    body = error.body.error
    old = body.param or ""
    new = names.get(old)
    if new is None:
        return error
    message = new + body.message.removeprefix(old) if body.message.startswith(old) else body.message
    return ApiError(error.status, message, param=new, code=body.code, headers=error.headers)


def _bounded(text: str, limit: int) -> str:
    """At most `limit` characters, all of which UTF-8 has: JSON may have brought halves of surrogate pairs."""
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return text.encode(errors="replace").decode()


def error_type(status: int) -> str:
    """The envelope's `type` for an HTTP status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "internal_error")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after_s: float = _DEFAULT_RETRY_AFTER_S, status: int = 503) -> ApiError:
    """The server can't do it now."""
    return ApiError(status, message, headers={"Retry-After": str(max(1, round(retry_after_s)))})


def http_error(status: int, detail: str = "", headers: dict[str, str] | None = None) -> ApiError:
    """An error of the HTTP layer: unknown path, wrong method, …"""
    return ApiError(status, detail or HTTPStatus(status).phrase, headers=headers)


def outcome_error(finished: Finished) -> ApiError | None:
    """The error that ended a stream; None when it ended well."""
    match finished.outcome:
        case Outcome.STOP | Outcome.LENGTH:
            return None
        case Outcome.REJECTED:
            status = _REJECT_STATUS.get(RejectCode(finished.reject_code), 503)
            if status == 400:
                return bad_request(finished.message, code=finished.reject_code)
            return unavailable(finished.message, finished.retry_after_s, status)
        case Outcome.IMPOSSIBLE:
            return bad_request(finished.message, code=finished.outcome)
        case Outcome.ABORTED:
            return unavailable(finished.message or "the request was aborted")
        case Outcome.CANCELLED:
            return ApiError(503, finished.message, code="cancelled")
        case Outcome.TIMEOUT:
            return ApiError(504, finished.message, code="timeout")
    return ApiError(500, finished.message or "the request failed")
