"""Request bodies: JSON, no larger and no slower than they may be. Raises ApiError."""

from __future__ import annotations

import asyncio
import json

from starlette.requests import Request

from cli.openai.errors import ApiError, bad_request

MOST_BYTES = 8 * 1024 * 1024
MOST_SECONDS = 30.0


async def read_json(request: Request) -> dict[str, object]:
    """The JSON object in a request's body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form on a foreign page can send anything but this
        raise ApiError(415, "unsupported_media_type", "send JSON with Content-Type: application/json.")
    try:
        async with asyncio.timeout(MOST_SECONDS):
            raw = await _read(request)
    except TimeoutError:
        raise ApiError(408, "request_timeout", f"the body did not arrive within {MOST_SECONDS:.0f} s.") from None
    try:
        body = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as problem:
        raise bad_request(f"the body is not JSON: {problem}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object.", code="invalid_json")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("the body spells half a character (a lone surrogate).", code="invalid_json") from None
    return body


async def _read(request: Request) -> bytes:
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > MOST_BYTES:
            raise ApiError(413, "request_too_large", f"the body is larger than {MOST_BYTES:,} bytes.")
    return bytes(raw)


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
