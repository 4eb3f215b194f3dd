"""Request bodies: JSON, no larger and no slower than they may be. Raises ApiError."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import chain

from anyio import to_thread
from starlette.requests import Request

from cli.openai.errors import ApiError, bad_request

MOST_BYTES = 8 * 1024 * 1024
MOST_SECONDS = 30.0
MOST_LEVELS = 100  # of lists and objects in each other; the libraries behind us give up somewhat later, less politely


async def read_json(request: Request) -> dict[str, object]:
    """The JSON object in a request's body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", ""):  # some clients name none; a form on a foreign page always names another
        raise ApiError(415, "unsupported_media_type", "send JSON with Content-Type: application/json.")
    try:
        async with asyncio.timeout(MOST_SECONDS):
            raw = await _read(request)
    except TimeoutError:
        raise ApiError(408, "request_timeout", f"the body did not arrive within {MOST_SECONDS:.0f} s.") from None
    return await to_thread.run_sync(parsed, raw)


def parsed(raw: bytes) -> dict[str, object]:
    """The JSON object that a body is. Raises ApiError."""
    try:
        body = json.loads(raw, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as problem:
        raise bad_request(f"the body is not JSON: {problem}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object.", code="invalid_json")
    if _deeper(body, MOST_LEVELS):
        raise bad_request(f"the body is nested more than {MOST_LEVELS} levels deep.", code="invalid_json")
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


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is too large a number")
    return number


def _deeper(value: dict[str, object], levels: int) -> bool:
    """Whether lists and objects hold each other more than `levels` deep."""
    inside: list[dict[str, object] | list[object]] = [value]
    for _ in range(levels):
        parts = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in inside)
        inside = [part for part in parts if isinstance(part, dict | list)]
    return bool(inside)
