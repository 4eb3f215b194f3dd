"""Words found again in kept conversations: which ones hold them all, and where. Knows no command and no screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

from cli.chat.archive import Archive, Record
from specexec.text.messages import text_in

AROUND = 60  # characters of an excerpt on each side of a word


@dataclass(frozen=True)
class Passage:
    """A conversation that holds all words, and the message that holds the most of them: its place and a part of it."""

    record: Record
    role: str
    place: int
    excerpt: str


def search(archive: Archive, words: Items[str]) -> Iterator[Passage]:
    """Conversations in which every one of the words occurs, in any message and any case; the latest first."""
    sought = [word.casefold() for word in words]
    # Most files can be told apart before they are read as JSON, in which a word may be spelled with escapes.
    for record in archive.everything([json.dumps(word, ensure_ascii=False)[1:-1] for word in words]):
        if not isinstance(record, Record):
            continue
        messages = record.dialogue
        said = [text_in(message["content"]).casefold() for message in messages]
        if not all(any(word in text for text in said) for word in sought):
            continue
        place = max(range(len(said)), key=lambda at: sum(word in said[at] for word in sought))
        message = messages[place]
        yield Passage(record, str(message["role"]), place, excerpt(text_in(message["content"]), sought))


def excerpt(text: str, words: Items[str]) -> str:
    """One line around the first of the words, which are in lower case."""
    line = " ".join(text.split())
    folded = line.casefold()
    places = [at for at in map(folded.find, words) if at >= 0]
    at = min(places, default=0)
    start, end = max(0, at - AROUND), at + AROUND
    return f"{'…' * (start > 0)}{line[start:end].strip()}{'…' * (end < len(line))}"
