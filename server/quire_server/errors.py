"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the status that fits."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from quire.errors import EngineDead, QueueFull

logger = logging.getLogger("quire.server")

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """What a client is told. ``param`` names the field at fault, ``code`` is for programs.

    It is an HTTPException because FastAPI lets those pass from where the body is read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status_code, self.headers)


def refuse(param: str, message: str, code: str | None = None) -> ApiError:
    """400: the request's field ``param`` cannot be honoured."""
    return ApiError(400, message, param=param, code=code)


def refused_field(name: str, reason: str, code: str) -> PydanticCustomError:
    """What a model's validator raises about one of its fields; pydantic adds where the model stands in the body."""
    return PydanticCustomError("refused", "{reason}", {"field": name[:64], "reason": reason, "code": code})


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def from_engine(error: Exception, param: str | None = None) -> ApiError:
    """What the engine client raised, as the client's error. ``param`` is used when the error names no field."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, EngineDead):
        return ApiError(503, f"the engine is not running: {error}", code="engine_dead", headers={"Retry-After": "5"})
    if isinstance(error, ValueError):
        return ApiError(400, str(error), param=getattr(error, "field", None) or param)
    return unforeseen(error)


def unforeseen(error: Exception) -> ApiError:
    """500. The log gets the kind of error and where it was raised, never its text: that may hold parts of a prompt."""
    logger.error(
        "a request failed with %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
    )
    return ApiError(500, "the server failed to process this request", code="internal_error")


def path_of(loc: Sequence[int | str]) -> str | None:
    """('messages', 0, 'content') as 'messages[0].content'; pydantic's names for members of a union are left out."""
    path = ""
    for part in loc:
        if isinstance(part, str) and path and (part in ("str", "int") or not part.isidentifier()):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or None


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first field at fault. A field of several possible types yields one error a type: their texts are joined."""
    first = errors[0]
    outer = ("body", "query")  # where FastAPI found it
    loc = tuple(first["loc"])[1:] if first["loc"] and first["loc"][0] in outer else tuple(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "refused":
        ctx = first["ctx"]
        param = path_of((*loc, ctx["field"])) or ""
        return refuse(param, f"{param}: {ctx['reason']}", ctx["code"])
    if not loc:
        if isinstance(first.get("input"), bytes):
            return ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
        return ApiError(400, "the body must be a JSON object")
    param = path_of(loc) or ""
    if first["type"] == "missing":
        return refuse(param, f"missing required parameter: {param}", "missing_required_parameter")
    alike = [e for e in errors if (path_of(tuple(e["loc"])[1:]) or "").startswith(param)]
    texts = list(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in alike))[:4]
    return refuse(param, f"{param}: {'; or '.join(texts)}")


def install(app: FastAPI) -> None:
    """Make every error of ``app`` an ApiError."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.response()
        message = error.detail
        if error.status_code == 404:
            message = f"no such route: {request.method} {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed on {request.url.path}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
