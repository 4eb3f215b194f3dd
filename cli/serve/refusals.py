"""A refusal as an HTTP response, and ignored fields of a request as a header."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse

from cli.messages_api.errors import error_body as messages_body
from cli.ollama_api.reply import error_body as ollama_body
from cli.openai.errors import ApiError
from cli.openai.logprobs import Json

NOTES = "X-Specexec-Notes"
_SHAPES: dict[str, Callable[[ApiError], Json]] = {"/v1/messages": messages_body, "/api/": ollama_body}
_MOST_LETTERS = 2000  # of a header; proxies allow some 4,000 to 8,000 for all of them


def response_of(refusal: ApiError, path: str) -> JSONResponse:
    """Status, headers, and the error in the shape of the protocol that this path belongs to, OpenAI's if none."""
    headers = {} if refusal.retry_s is None else {"Retry-After": str(refusal.retry_s)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    shapes = [shape for prefix, shape in _SHAPES.items() if path.startswith(prefix)]
    return JSONResponse(shapes[0](refusal) if shapes else refusal.body, refusal.status, headers)


def notes_header(notes: tuple[str, ...]) -> dict[str, str]:
    """The sentences on what was left out, in letters that a header may hold."""
    if not notes:
        return {}
    text = "; ".join(notes).encode("ascii", "backslashreplace").decode()
    return {NOTES: "".join(letter if letter.isprintable() else " " for letter in text)[:_MOST_LETTERS].strip()}
