"""What a full context does to a conversation: --on-full. All messages are kept; some are no longer read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from cli.shared.errors import TERMINATED
from cli.shared.quantities import format_count
from specexec.pieces import Piece
from specexec.text.dialogue import Dialogue
from specexec.text.messages import Message, question, text_in
from specexec.text.transcript import LeftOut

if TYPE_CHECKING:
    from cli.chat.session import AnyConversation, Session
    from cli.mcp.toolbox import Results

OnFull: TypeAlias = Literal["stop", "drop-oldest-turns", "summarise"]
ON_FULL: tuple[OnFull, ...] = ("stop", "drop-oldest-turns", "summarise")
SUMMARISE = (
    "Summarise our conversation so far, in at most 150 words, so that we can go on from the summary alone: what was "
    "asked, what was found or decided, names and numbers that matter, and what is still open. Write only the summary."
)


def make_room(session: Session, more: Items[Message]) -> bool:
    """Leave out the oldest turns if the context has no room for a question, or for results, and an answer; says so.

    Half of the context stays for what is read: the next turns then need no room to be made. Nothing is left out for a
    turn that is too long by itself. False if the user stopped the summary; then nothing is left out either.
    """
    conversation, context = session.conversation, session.engine.context
    if session.on_full == "stop" or not isinstance(conversation, Dialogue):
        return True
    if conversation.tokens_with(more) <= _room(session):
        return True
    count = conversation.beyond(more, context // 2)
    if count == conversation.left_out.messages or conversation.tokens_with(more, LeftOut(count)) >= context:
        return True
    summary = ""
    if session.on_full == "summarise":
        written = _summary(session, count)
        if written is None:
            return False
        summary = written
    conversation.left_out = LeftOut(count, summary)
    session.screen.tell(f"the context of {context} tokens is nearly full: {left_out_note(conversation)}")
    if summary:
        session.screen.say(f"  the summary: {summary}")
    return True


def results_with_room(session: Session, results: Results) -> list[Message] | None:
    """Results of tools as far as the context has room for them and an answer: the oldest turns make room where that is
    wished, then each result is cut; says so. None if the user stopped the summary.
    """
    conversation = session.conversation
    assert isinstance(conversation, Dialogue)
    fitting = results.messages
    if not make_room(session, fitting):
        return None
    room = _room(session)
    if conversation.tokens_with(fitting) <= room:
        return fitting

    def is_too_much(most: int) -> bool:
        return conversation.tokens_with(results.cut(most)) > room

    longest = max(len(text_in(one["content"])) for one in fitting)
    most = max(bisect_left(range(longest), True, key=is_too_much) - 1, 0)
    session.screen.tell(
        f"  Note: the context of {session.engine.context} tokens is nearly full: only the first {format_count(most)} "
        "characters of each result go to the model; --on-full drop-oldest-turns makes room, /undo takes a turn back"
    )
    return results.cut(most)


def _room(session: Session) -> int:
    """Tokens that may be read before an answer."""
    context = session.engine.context
    return context - min(session.sampling.max_tokens, context // 4)


def left_out_note(conversation: AnyConversation) -> str:
    """What the model reads no more."""
    left_out, said = conversation.left_out, len(conversation.messages)
    instead = "reads a summary of" if left_out.summary else "no longer reads"
    return f"the model {instead} the first {left_out.messages} of {said} messages"


def _summary(session: Session, count: int) -> str | None:
    """The first `count` messages in the model's own words; empty if it cannot be had, None if the user stopped it."""
    conversation, engine = session.conversation, session.engine
    assert isinstance(conversation, Dialogue)
    other = engine.conversation(conversation.system)
    other.messages, other.left_out = conversation.messages[:count], conversation.left_out
    longest = min(engine.context // 8, engine.context - other.tokens_with([question(SUMMARISE)]))
    if longest < engine.context // 32:
        session.screen.tell("Note: the oldest messages are too long to be summarised; they are left out.")
        return ""
    session.screen.say(f"  summarising the first {count} messages…")
    sampling = replace(session.sampling, max_tokens=longest, stop=())
    answer = session.play(replace(burst, piece=Piece()) for burst in other.send(SUMMARISE, sampling))
    if answer.finish_reason == "interrupted":
        session.last, session.leaving = answer, answer.exit_code == TERMINATED
        return None
    return text_in(other.messages[-1]["content"]).strip()
