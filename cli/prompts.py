"""What to answer: prompts from the command line, files and standard input, each with a name of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.errors import BadJsonl, BadText
from specexec.errors import EmptyPrompt, SpecexecError

FIELDS = ("prompt", "messages", "text")
STDIN = "-"

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Item:
    """One prompt to answer, or the reason why it cannot be."""

    id: str
    prompt: Prompt = ""
    problem: SpecexecError | None = None


def read_items(prompts: Sequence[str], paths: Sequence[str], *, field: str | None, chat: bool) -> list[Item]:
    """Every prompt in the order given; a bad line keeps its place and carries its reason."""
    found = [(f"prompt:{number}", prompt) for number, prompt in enumerate(prompts, start=1)]
    items = [_item(name, prompt, chat) for name, prompt in found]
    for path in paths:
        items += _from_path(path, field, chat)
    return items


def with_stdin(prompt: str) -> str:
    """The prompt with whatever was piped in put in front of it."""
    piped = "" if sys.stdin.isatty() else _read_stdin().strip("\n")
    text = "\n\n".join(part for part in (piped, prompt) if part.strip())
    if not text:
        raise EmptyPrompt("the prompt is empty.")
    return text


def _from_path(path: str, field: str | None, chat: bool) -> Iterator[Item]:
    if path != STDIN and Path(path).suffix == ".jsonl":
        for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
            if line.strip():
                yield _from_line(f"{path}:{number}", line, field, chat)
        return
    name = "stdin" if path == STDIN else path
    try:
        text = _read_stdin() if path == STDIN else Path(path).read_text(encoding="utf-8")
        yield _item(name, text.removesuffix("\n"), chat)
    except UnicodeDecodeError:
        yield Item(name, problem=BadText(f"{name} is not UTF-8 text."))
    except BadText as problem:
        yield Item(name, problem=problem)


def _from_line(place: str, line: bytes, field: str | None, chat: bool) -> Item:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Item(place, problem=BadJsonl(f"{place}: not UTF-8 text."))
    except json.JSONDecodeError as problem:
        return Item(place, problem=BadJsonl(f"{place}: not JSON ({problem.msg}, column {problem.colno})."))
    if not isinstance(record, dict):
        return Item(place, problem=BadJsonl(f"{place}: a line must be an object, this is a {type(record).__name__}."))
    name = str(record.get("id", record.get("custom_id", place)))
    wanted = (field,) if field else FIELDS
    present = [key for key in wanted if key in record]
    if not present:
        missing = " or ".join(map(repr, wanted))
        return Item(name, problem=BadJsonl(f"{place}: no field {missing}.", hint="name it with --field."))
    return _item(name, record[present[0]], chat, f"{place}: field {present[0]!r}")


def _item(name: str, value: object, chat: bool, place: str | None = None) -> Item:
    place = place or name
    if isinstance(value, str):
        if not value.strip():
            return Item(name, problem=EmptyPrompt(f"{place}: the prompt is empty."))
        return Item(name, [{"role": "user", "content": value}] if chat else value)
    messages = _messages(value)
    if messages is None:
        return Item(name, problem=BadJsonl(f"{place}: neither text nor messages with role and content."))
    if not chat:
        return Item(name, problem=BadJsonl(f"{place}: messages need the chat template.", hint="leave out --raw."))
    return Item(name, messages)


def _messages(value: object) -> list[dict[str, str]] | None:
    """`value`, if it is what a chat template takes."""
    if not isinstance(value, list) or not value:
        return None
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return None
    return value


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise BadText("standard input is not UTF-8 text.") from None
