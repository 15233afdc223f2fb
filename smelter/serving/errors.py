"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with an HTTP status of 4xx or 5xx; `param` names the field of the request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body(), self.status, self.headers)


def _field(location: Sequence[Any]) -> str:
    """`stop.3` of ("body", "stop", "list[...]", 3): without the names that pydantic gives to alternatives."""
    kept = [str(part) for part in location[1:] if not any(sign in str(part) for sign in "[]()-")]
    return ".".join(part for part in kept if part not in ("str", "int", "float", "bool", "TextPart"))


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's complaints in one line. What was sent is not repeated: it may not be text at all."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be parsed')}")
    # Of a union's alternatives, one that was meant says more than one of another type.
    meant = [error for error in errors if not str(error["type"]).endswith("_type")]
    if len(errors) > 1 and meant:
        first = meant[0]
    field = _field(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "model_attributes_type":
        message = "must be a JSON object"
    return ApiError(400, f"{field}: {message}" if field else f"the body: {message}", param=field or None)


def install_handlers(app: FastAPI) -> None:
    """Give every error of the app OpenAI's form."""

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 400:  # FastAPI's own, where the body is no JSON of a kind that it has a message for
            message = "the body cannot be read: it must be JSON in UTF-8, and not nested too deeply"
        if error.status_code == 404:
            message = f"no route {request.method} {request.url.path}: see /docs"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, message, headers=headers).response()

    @app.exception_handler(Exception)
    async def defect(_request: Request, _error: Exception) -> JSONResponse:
        return ApiError(500, "a defect of the server; its log says more").response()
