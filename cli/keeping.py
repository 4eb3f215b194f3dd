"""Saves a conversation after every turn, and its keys and values when it is left; takes both up again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cli.archive import Archive, Record
from cli.errors import BadSnapshot
from cli.quantities import format_bytes, format_count
from cli.screen import Screen

if TYPE_CHECKING:
    from specexec.conversation import Conversation
    from specexec.engine import Engine


class Keeper:
    """One per conversation that is kept."""

    def __init__(
        self, archive: Archive, record: Record, engine: Engine, conversation: Conversation, screen: Screen
    ) -> None:
        self._archive = archive
        self._record = record
        self._engine = engine
        self._conversation = conversation
        self._screen = screen
        self._saved: tuple[object, ...] = (None, ())

    @property
    def record(self) -> Record:
        return self._record

    @property
    def conversation(self) -> Conversation:
        return self._conversation

    def successor(self, record: Record) -> Keeper:
        """Takes up another conversation with the same engine."""
        other = Keeper(self._archive, record, self._engine, self._engine.conversation(), self._screen)
        other.resume()
        return other

    @property
    def id(self) -> str:
        return self._record.id

    def save(self) -> None:
        """Put what was said on the disk, if anything was said since the last time."""
        messages = tuple(dict(message) for message in self._conversation.messages)
        now = (self._conversation.system, messages)
        if now != self._saved and (messages or self._record.messages):
            self._record = replace(self._record, system=self._conversation.system, messages=messages)
            self._archive.save(self._record)
            self._saved = now

    def leave(self, *, for_now: bool = False) -> None:
        """Save with everything that makes going on cheap and, unless it is `for_now`, say how to go on."""
        self.save()
        if not self._record.messages:
            return
        from cli.snapshot import write_snapshot

        path = self._archive.snapshot_path(self.id)
        size = write_snapshot(path, self._conversation.keep(), self._weights())
        if not size:
            path.unlink(missing_ok=True)
        if for_now:
            return
        kept = f", {format_bytes(size)} of keys and values with it" if size else ""
        self._screen.say(f"saved as {self.id}{kept}. Go on with: specexec chat -c")

    def resume(self) -> None:
        """Go on where the record ends, and say how much of it need not be read again."""
        from cli.snapshot import read_snapshot

        conversation, record = self._conversation, self._record
        kept = conversation.keep()
        kept.messages, kept.system = [dict(message) for message in record.messages], record.system
        if conversation.system is not None:
            kept.system = conversation.system  # asked for anew on the command line
        self._saved = (kept.system, record.messages)
        path = self._archive.snapshot_path(self.id)
        how = "it is read again with the next message"
        if path.exists():
            try:
                read_snapshot(path, kept, self._weights())
                how = f"{format_count(len(kept.caches['target']))} tokens need not be read again"
            except BadSnapshot as refusal:
                self._screen.tell(f"Note: the snapshot of this conversation is not used: {refusal.what}")
        conversation.take_up(kept)
        self._screen.say(f"{self.id}: {len(record.messages)} messages; {how}")

    def _weights(self) -> dict[str, str]:
        from cli.snapshot import fingerprint

        return {role: fingerprint(folder) for role, folder in self._engine.folders.items()}


def stored_name(model: str) -> str:
    """A model's name that means the same from any folder."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model
