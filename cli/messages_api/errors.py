"""Refusals as Anthropic's clients read them."""

from __future__ import annotations

from cli.openai.errors import ApiError
from cli.openai.logprobs import Json

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(refusal: ApiError) -> Json:
    """{"type": "error", "error": {type, message}}; the message names the field, for there is no other place for it."""
    otherwise = "api_error" if refusal.status >= 500 else "invalid_request_error"
    named = refusal.param is None or refusal.param in refusal.message
    message = refusal.message if named else f"{refusal.param}: {refusal.message}"
    return {"type": "error", "error": {"type": _KINDS.get(refusal.status, otherwise), "message": message}}
