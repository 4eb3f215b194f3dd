"""Slash commands about what was said: /undo, /retry, /edit, /read, /copy, /save, /load and others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import click

from cli.chat.archive import Archive, Record, sessions_folder
from cli.chat.raw import RawConversation
from cli.chat.search import search as words_in
from cli.chat.session import Session
from cli.chat.sessions import found_lines, listing
from cli.shared.options import NATURAL
from cli.shared.quantities import format_count
from offload.machine.folders import typed_path
from specexec.text.pictures import data_url, is_image_file

FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHOWN_SESSIONS = 10


def leave(session: Session, _: str) -> None:
    session.leaving = True


def clear(session: Session, _: str) -> None:
    left = session.begin_anew()
    session.screen.tell(f"{left} is kept; a new conversation" if left else "a new conversation")


def undo(session: Session, _: str) -> None:
    session.screen.tell("the last exchange is gone" if session.conversation.undo() else "nothing to undo")


def retry(session: Session, argument: str) -> None:
    if session.last_question is None:
        session.screen.tell("nothing to retry")
        return
    session.retry(NATURAL(argument) if argument else None)


def proceed(session: Session, _: str) -> None:
    session.proceed()


def edit(session: Session, _: str) -> None:
    written = click.edit("", extension=".md")
    if not (written or "").strip():
        session.screen.tell("empty: nothing was sent to the model")
    else:
        session.send(str(written).removesuffix("\n"))


def edit_last(session: Session, _: str) -> None:
    asked = session.last_question
    if asked is None:
        session.screen.tell("nothing to edit")
        return
    edited = click.edit(asked, extension=".md")
    if edited is None or edited.strip() in ("", asked.strip()):
        session.screen.tell("unchanged: nothing was sent to the model")
    else:
        session.ask_again(edited.removesuffix("\n"))


def read(session: Session, argument: str) -> None:
    path = _path(argument, "/read FILE")
    if is_image_file(path):
        if isinstance(session.conversation, RawConversation):
            raise click.BadParameter("plain completion reads text; images are for specexec chat")
        session.pictures.append(data_url(path))
        session.screen.tell(f"{path}: the image goes before your next message")
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise click.BadParameter(f"{path} is not UTF-8 text") from None
    session.attached.append(text)
    session.screen.tell(f"{path}: {format_count(len(text))} characters go before your next message")


def copy(session: Session, argument: str) -> None:
    if argument not in ("", "code"):
        raise click.BadParameter("/copy takes the last answer, /copy code its last block of code")
    answer = str(session.last_answer.get("content") or "")
    found = FENCED.findall(answer)[-1:] if argument else [answer] * bool(answer)
    if not found:
        session.screen.tell(f"no {argument or 'answer'} to copy")
    elif session.screen.copy(found[0]):
        session.screen.tell(f"{format_count(len(found[0]))} characters are on the clipboard, if the terminal allows it")
    else:
        session.screen.tell("there is no terminal that could copy; /save FILE writes to a file")


def save(session: Session, argument: str) -> None:
    if not argument and session.keeper is not None:
        session.keep()
        session.screen.tell(f"every turn is kept as {session.keeper.id}; /save FILE writes a copy")
        return
    path = _path(argument, "/save FILE")
    system = session.conversation.system
    first: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
    messages = [*first, *session.conversation.messages]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(message, ensure_ascii=False) + "\n" for message in messages)
    except FileExistsError as error:
        raise click.BadParameter(f"{path} is there already and is not replaced; choose another name") from error
    session.screen.tell(f"{path}: {len(messages)} messages")


def load(session: Session, argument: str) -> None:
    if not argument:
        raise click.BadParameter("which conversation? /sessions lists them")
    if session.keeper is None:
        raise click.BadParameter("this conversation is not kept, and would be lost; /save FILE, then specexec chat")
    session.take_up(Archive(sessions_folder()).load(argument))


def sessions(session: Session, _: str) -> None:
    archive = Archive(sessions_folder())
    records = [record for record in archive.everything() if isinstance(record, Record)][:SHOWN_SESSIONS]
    session.screen.tell("\n".join(listing(archive, records)) if records else "no conversations yet")


def search(session: Session, argument: str) -> None:
    if not argument:
        raise click.BadParameter("which words? /search WORDS")
    archive = Archive(sessions_folder())
    found = [*islice(words_in(archive, argument.split()), SHOWN_SESSIONS)]
    session.screen.tell("\n".join(found_lines(archive, found)) if found else f"no conversation holds {argument}")


def kept_ids() -> Iterable[str]:
    return [record.id for record in Archive(sessions_folder()).everything() if isinstance(record, Record)]


def system(session: Session, argument: str) -> None:
    if argument:
        session.conversation.system = None if argument == "off" else argument
    session.screen.tell(f"system: {session.conversation.system or '(none)'}")


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise click.BadParameter(f"which file? {usage}")
    return typed_path(argument)
