"""Events as bytes on their way to a client: server-sent events, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from sse_starlette import ServerSentEvent

from cli.openai.reply import StreamEvent


@dataclass(frozen=True)
class Framing:
    """How a protocol streams."""

    media_type: str
    bytes_of: Callable[[StreamEvent], bytes]


def _server_sent(event: StreamEvent) -> bytes:
    return ServerSentEvent(_json(event), event=event.name, comment=event.comment, sep="\n").encode()


def _line(event: StreamEvent) -> bytes:
    return f"{_json(event)}\n".encode()


def _json(event: StreamEvent) -> str | None:
    if event.data is None or isinstance(event.data, str):
        return event.data
    return json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))


EVENTS = Framing("text/event-stream", _server_sent)
LINES = Framing("application/x-ndjson", _line)
