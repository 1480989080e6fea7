"""Errors in OpenAI's shape, and for its messages in Anthropic's: what goes wrong anywhere, in one table."""

import math
import re
from typing import Any, Literal

from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gmanager.wire.errors import DistattnError, FrameTooLarge, RequestRefused, TextError, TextUnavailable
from gmanager.wire.messages import RefusalReason, SamplingParams

RETRY_AFTER_S = 1


MESSAGES_PATH = "/v1/messages"
"""Here, and at what stands under it, Anthropic's API is served."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every answer but 2xx holds."""

    error: ErrorDetail


class MessagesErrorDetail(BaseModel):
    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """The same at `MESSAGES_PATH`."""

    type: Literal["error"]
    error: MessagesErrorDetail


class ApiError(HTTPException):
    """An answer that is an error. Starlette's kind: FastAPI answers 400 to any other that is raised while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`retry_after_s`: instead of RETRY_AFTER_S, where that is told."""
        headers = dict(_HEADERS.get(status, {}))
        if retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        super().__init__(status, message, headers or None)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def messages_error(error: ApiError) -> dict[str, Any]:
    """In Anthropic's shape, which has no place for the field's name but the message."""
    status, text = error.status_code, str(error.detail)
    if error.param is not None and error.param not in text:
        text = f"{error.param}: {text}"
    kind = _MESSAGES_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if error.code == "service_failed":
        kind = "api_error"
    return {"type": "error", "error": {"type": kind, "message": text}}


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """In the shape that clients of this path read."""
    return messages_error(error) if path.startswith(MESSAGES_PATH) else error.body()


_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    429: {"retry-after": str(RETRY_AFTER_S)},
    503: {"retry-after": str(RETRY_AFTER_S)},
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
_MESSAGES_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_REFUSED: dict[RefusalReason, tuple[int, str | None]] = {
    "invalid": (400, None),
    "too_long": (400, "context_length_exceeded"),
    "never": (422, "never_fits"),
    "model": (404, "model_not_found"),
    "full": (429, "queue_full"),
    "not_ready": (503, "not_ready"),
    "unknown": (404, "not_found"),
    "overloaded": (429, "rate_limit_exceeded"),
    "unreachable": (422, "objective_unreachable"),
}


_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)


def sampling_field(text: str) -> str | None:
    """The field that an error of SamplingParams, or of what became of them, is about."""
    return next((word for word in re.findall(r"[a-z_]+", text) if word in _SAMPLING_FIELDS), None)


def translate(error: DistattnError, prompt_field: str | None = None) -> ApiError:
    """What a client of the service was told, as an answer. `prompt_field`: what the HTTP request calls the prompt."""
    if isinstance(error, RequestRefused):
        status, code = _REFUSED[error.reason]
        param = prompt_field if error.reason in ("invalid", "too_long", "never") else None
        if error.reason == "invalid":
            param = sampling_field(str(error)) or param
        return ApiError(status, str(error), param=param, code=code, retry_after_s=error.retry_after_s)
    if isinstance(error, FrameTooLarge):
        return ApiError(413, str(error))
    if isinstance(error, TextError) and not isinstance(error, TextUnavailable):
        return ApiError(400, str(error), param=prompt_field)
    return ApiError(503, str(error), code="service_failed")  # it was fine, and the service was not
