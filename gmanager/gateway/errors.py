"""Errors in OpenAI's shape: what goes wrong anywhere, in one table."""

import re
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gmanager.wire.errors import DistattnError, FrameTooLarge, RequestRefused, TextError, TextUnavailable
from gmanager.wire.messages import RefusalReason, SamplingParams

RETRY_AFTER_S = 1


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every answer but 2xx holds."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer that is an error. Starlette's kind: FastAPI answers 400 to any other that is raised while it reads a body."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, _HEADERS.get(status))
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    429: {"retry-after": str(RETRY_AFTER_S)},
    503: {"retry-after": str(RETRY_AFTER_S)},
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}

_REFUSED: dict[RefusalReason, tuple[int, str | None]] = {
    "invalid": (400, None),
    "too_long": (400, "context_length_exceeded"),
    "never": (422, "never_fits"),
    "model": (404, "model_not_found"),
    "full": (429, "queue_full"),
    "not_ready": (503, "not_ready"),
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
        return ApiError(status, str(error), param=param, code=code)
    if isinstance(error, FrameTooLarge):
        return ApiError(413, str(error))
    if isinstance(error, TextError) and not isinstance(error, TextUnavailable):
        return ApiError(400, str(error), param=prompt_field)
    return ApiError(503, str(error), code="service_failed")  # it was fine, and the service was not
