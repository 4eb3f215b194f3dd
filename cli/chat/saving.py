"""Saves a conversation after every turn, and restores it. Its keys and values are in the prefix cache, if anywhere.

Nothing that was saved is overwritten: what is taken back or answered again stays in the file, and a
conversation that another process continued stays as it left it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from cli.chat.archive import Archive, Record, TakenBack
from cli.connect.conversation import ServedConversation
from cli.connect.engine import ServedEngine
from cli.shared.quantities import format_count
from cli.terminal.screen import Screen
from offload.machine.folders import typed_path
from specexec.text.messages import Message
from specexec.text.transcript import NOTHING, belonging

if TYPE_CHECKING:
    from cli.chat.engines import ChatEngine
    from specexec.text.conversation import Conversation
    from specexec.text.transcript import Kept

    KeptConversation: TypeAlias = Conversation | ServedConversation


class Keeper:
    """One per conversation that is kept."""

    def __init__(
        self, archive: Archive, record: Record, engine: ChatEngine, conversation: KeptConversation, screen: Screen
    ) -> None:
        self._archive = archive
        self._record = record
        self._engine = engine
        self._conversation = conversation
        self._screen = screen
        self._saved: tuple[object, ...] = (None, ())
        self._where = f" --connect {engine.model.server.address}" if isinstance(engine, ServedEngine) else ""

    @property
    def record(self) -> Record:
        return self._record

    @property
    def conversation(self) -> KeptConversation:
        return self._conversation

    @property
    def id(self) -> str:
        return self._record.id

    def successor(self, record: Record) -> Keeper:
        """Takes up another conversation with the same engine."""
        taken_up = self._engine.conversation()
        taken_up.like(self._conversation)
        other = Keeper(self._archive, record, self._engine, taken_up, self._screen)
        other.resume(self._record.model)
        return other

    def anew(self) -> Keeper:
        """Begins another conversation with the same engine and system prompt."""
        begun = self._engine.conversation(self._conversation.system)
        begun.like(self._conversation)
        return Keeper(self._archive, self._archive.new(self._record.model), self._engine, begun, self._screen)

    def save(self) -> None:
        """Put what was said on the disk, if anything was said since the last time."""
        kept = self._conversation.keep()
        messages, now = tuple(dict(message) for message in kept.messages), _state(kept)
        if now == self._saved or not (messages or self._record.messages):
            return
        before, self._saved = self._record, now
        taken_back = (*before.taken_back, *_lost(before, kept.system, messages))
        changed = replace(
            before, system=kept.system, messages=messages, turns=tuple(kept.turns), taken_back=taken_back,
            left_out=kept.left_out, lossy=tuple(dict.fromkeys((*before.lossy, *self._engine.lossy))),
        )  # fmt: skip
        self._record = self._archive.save(changed)
        if self.id != before.id:
            self._screen.tell(f"Note: {before.id} was continued elsewhere; this conversation is kept as {self.id}.")

    def leave(self, *, for_now: bool = False) -> None:
        """Save and, unless it is `for_now`, say how to continue."""
        self.save()
        if not self._record.messages or for_now:
            return
        known = self._known()
        kept = f", keys and values of {format_count(known)} tokens with it" if known else ""
        self._screen.say(f"saved as {self.id}{kept}. Continue with: specexec chat -c{self._where}")

    def _known(self) -> int:
        """Tokens of the conversation that need not be read again, as far as is known here."""
        if isinstance(self._engine, ServedEngine):
            return 0  # the server has its own
        turns = self._conversation.keep().turns
        return max((self._engine.prefixes.known(turn.tokens) for turn in turns), default=0)

    def resume(self, model: str | None = None) -> None:
        """Continue where the record ends, with its model or this one, and say how much of it need not be read again.

        Another model, or one that has room for all of it now, reads what was left out.
        """
        had = self._record.model
        answered, unanswered = _answered(self._record)
        conversation, record = self._conversation, replace(answered, model=model or had)
        self._record = record
        if not record.messages:
            return
        kept = conversation.keep()
        kept.messages, kept.system = [dict(message) for message in record.messages], record.system
        kept.left_out = record.left_out
        if conversation.system is not None:
            kept.system = conversation.system  # asked for anew on the command line
        kept.turns = belonging(record.turns, kept.dialogue)
        conversation.take_up(kept)
        context = self._engine.context
        if record.left_out != NOTHING and (
            record.model != had or conversation.tokens_with((), NOTHING) <= context - context // 4
        ):
            conversation.left_out = NOTHING
        self._saved = _state(conversation.keep())
        known = self._known()
        how = "it is read again with the next message"
        if known:
            how = f"{format_count(known)} tokens need not be read again"
        self._screen.say(f"{self.id}: {len(record.messages)} messages; {how}")
        if record.lossy:
            self._screen.tell(f"Note: some of its answers were written with --lossy {' '.join(record.lossy)}.")
        if unanswered:
            self._screen.tell(f"Note: {unanswered} of its questions got no answer; the model does not read them.")


def stored_name(model: str) -> str:
    """A model's name that means the same from any folder."""
    path = typed_path(model)
    return str(path.resolve()) if path.exists() else model


def _state(kept: Kept) -> tuple[object, ...]:
    """What another saving would have to keep."""
    written = [(len(turn.written), turn.ended) for turn in kept.turns]
    return kept.system, tuple(dict(message) for message in kept.messages), kept.left_out, written


def _lost(before: Record, system: str | None, messages: Items[Message]) -> list[TakenBack]:
    """What a record held and its conversation holds no more."""
    same = 0
    while same < min(len(before.messages), len(messages)) and before.messages[same] == messages[same]:
        same += 1
    rest, lost = before.messages[same:], []
    if before.messages and before.system and before.system != system:
        lost.append(TakenBack(0, ({"role": "system", "content": before.system},)))
    if rest and not (len(rest) == 1 and same < len(messages) and _grown(rest[0], messages[same])):
        lost.append(TakenBack(same, rest))
    return lost


def _grown(before: Message, now: Message) -> bool:
    parts = ("content", "reasoning_content")
    grown = all(str(now.get(part) or "").startswith(str(before.get(part) or "")) for part in parts)
    return before["role"] == now["role"] and grown and len(_calls(before)) <= len(_calls(now))


def _calls(message: Message) -> list[object]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _answered(record: Record) -> tuple[Record, int]:
    """The record with those questions set aside whose answer was stopped before its first word, and how many."""
    messages, taken_back = list[Message](), [*record.taken_back]
    written = {record.place_of(turn) for turn in record.turns if turn.written}
    left_out = record.left_out
    for place, message in enumerate(record.messages):
        empty = message == {"role": "assistant", "content": ""} and place not in written
        if empty and messages and messages[-1]["role"] == "user":
            taken_back.append(TakenBack(len(messages) - 1, (messages.pop(), message)))
            if place < record.left_out.messages:
                left_out = replace(left_out, messages=left_out.messages - 2)
        else:
            messages.append(message)
    found = len(taken_back) - len(record.taken_back)
    return replace(record, messages=tuple(messages), taken_back=tuple(taken_back), left_out=left_out), found
