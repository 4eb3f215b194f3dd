"""Prompts to measure with: a user's own file, or those the demo can answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from offload.hub.names import demo_folder
from specexec.errors import BadText

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Measured:
    """One prompt: how it is shown, and what the engine is asked."""

    text: str
    asked: str | Messages


def bench_prompts(file: Path | None) -> list[Measured]:
    """A prompt a line: text is a chat of one message; JSON lines may say `"chat": false` for raw continuation."""
    if file is None:
        golden = json.loads((demo_folder("target").parent / "golden.json").read_text(encoding="utf-8"))
        return [_chat(row["prompt"]) for row in golden]
    lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if not lines:
        raise BadText(f"{file} holds no prompts.")
    return [_row(line, file) if file.suffix == ".jsonl" else _chat(line) for line in lines]


def _row(line: str, file: Path) -> Measured:
    try:
        row = json.loads(line)
        text = str(row["prompt"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadText(f'{file}: not a JSON line with a "prompt": {line[:60]}') from None
    return _chat(text) if row.get("chat", True) else Measured(text, text)


def _chat(text: str) -> Measured:
    return Measured(text, [{"role": "user", "content": text}])
