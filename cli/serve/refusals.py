"""A refusal as an HTTP response."""

from __future__ import annotations

from starlette.responses import JSONResponse

from cli.openai.errors import ApiError


def response_of(refusal: ApiError) -> JSONResponse:
    """Status, headers, and the error in OpenAI's shape."""
    headers = {} if refusal.retry_s is None else {"Retry-After": str(refusal.retry_s)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body, refusal.status, headers)
