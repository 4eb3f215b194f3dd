"""A refusal as an HTTP response, and ignored fields of a request as a header."""

from __future__ import annotations

from starlette.responses import JSONResponse

from cli.openai.errors import ApiError

NOTES = "X-Specexec-Notes"
_MOST_LETTERS = 2000  # of a header; proxies allow some 4,000 to 8,000 for all of them


def response_of(refusal: ApiError) -> JSONResponse:
    """Status, headers, and the error in OpenAI's shape."""
    headers = {} if refusal.retry_s is None else {"Retry-After": str(refusal.retry_s)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body, refusal.status, headers)


def notes_header(notes: tuple[str, ...]) -> dict[str, str]:
    """The sentences on what was left out, in letters that a header may hold."""
    if not notes:
        return {}
    text = "; ".join(notes).encode("ascii", "backslashreplace").decode()
    return {NOTES: "".join(letter if letter.isprintable() else " " for letter in text)[:_MOST_LETTERS].strip()}
