"""`specexec sessions`: the conversations that chat has kept. Reads and removes files; loads nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence as Items
from itertools import islice

import click

from cli.chat.archive import Archive, Record, sessions_folder
from cli.chat.search import Passage, search
from cli.shared.control_codes import echo
from cli.shared.errors import BadSession
from cli.shared.options import WholeNumber
from cli.shared.verbosity import json_option, verbosity_options
from cli.terminal.table import table
from specexec.text.messages import Message, pictures_of, text_in

JSON = json_option()
SHOWN = 48  # characters of a title


@click.group()
@verbosity_options
def sessions() -> None:
    """List, search, show, export or remove the conversations that chat has kept.

    \b
      specexec sessions list
      specexec sessions search tomato soup
      specexec chat --session 0612
    """


@sessions.command("list")
@JSON
@verbosity_options
def list_sessions(as_json: bool) -> None:
    """List conversations, the latest first."""
    archive = Archive(sessions_folder())
    kept = list(archive.everything())
    records = [record for record in kept if isinstance(record, Record)]
    if as_json:
        echo(json.dumps([_facts(archive, record) for record in records], ensure_ascii=False))
    elif records:
        echo("\n".join(listing(archive, records)))
    for problem in kept:
        if isinstance(problem, BadSession):
            echo(f"Note: {problem.what}", err=True)
    if not kept and not as_json:
        echo("no conversations yet; specexec chat begins one", err=True)


@sessions.command("search")
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", type=WholeNumber(min=1), metavar="N", default=20, show_default=True, help="Most to show.")
@JSON
@verbosity_options
def search_sessions(words: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Find conversations in which all these words occur, in any case; the latest first."""
    archive = Archive(sessions_folder())
    found = [*islice(search(archive, words), limit + 1)]
    if as_json:
        places = [{"message": one.place, "role": one.role, "excerpt": one.excerpt} for one in found]
        rows = [_facts(archive, one.record) | place for one, place in zip(found, places, strict=True)]
        echo(json.dumps(rows[:limit], ensure_ascii=False))
        return
    echo("\n".join(found_lines(archive, found[:limit])), nl=bool(found), folded=True)
    if len(found) > limit:
        echo("there are more; another word, or --limit", err=True)
    if not found:
        echo(f"no conversation holds {' and '.join(words)}", err=True)


@sessions.command("show")
@click.argument("id")
@JSON
@verbosity_options
def show(id: str, as_json: bool) -> None:
    """Print one conversation. The beginning of its ID is enough."""
    record = Archive(sessions_folder()).load(id)
    if as_json:
        echo(json.dumps(record.facts, ensure_ascii=False))
    else:
        echo(_markdown(record), nl=False)
        if record.taken_back:
            echo(f"Note: {len(record.taken_back)} times something was taken back or replaced; --json has it.", err=True)


@sessions.command("export")
@click.argument("id")
@click.option(
    "--format", "form", type=click.Choice(["md", "jsonl"]), default="md", help="Markdown, or one message a line."
)
@verbosity_options
def export(id: str, form: str) -> None:
    """Write one conversation to standard output."""
    record = Archive(sessions_folder()).load(id)
    if form == "md":
        echo(_markdown(record), nl=False)
        return
    for message in record.dialogue:
        echo(json.dumps(message, ensure_ascii=False))


@sessions.command("rm")
@click.argument("ids", nargs=-1, required=True)
@verbosity_options
def remove(ids: tuple[str, ...]) -> None:
    """Remove conversations and their keys and values."""
    from cli.engine.prefix_store import forget, prefixes_folder

    archive = Archive(sessions_folder())
    for record in [archive.load(id) for id in ids]:  # all of them must exist before one is removed
        archive.remove(record.id)
        for turn in record.turns:
            forget(turn.tokens, prefixes_folder())
        echo(f"removed {record.id}", err=True)


def listing(archive: Archive, records: list[Record]) -> list[str]:
    """Conversations as lines for people."""
    rows = [[str(value) for value in _row(archive, record)] for record in records]
    return table([("ID", "SAVED", "MODEL", "MESSAGES", "BEGINS"), *rows])


def found_lines(archive: Archive, found: Items[Passage]) -> list[str]:
    """Two lines for each: the conversation, and who said what."""
    lines = []
    for one in found:
        id, saved, model, _, title = _row(archive, one.record)
        lines += [f"{id}  {saved}  {model}  {title}", f"    {one.role}: {one.excerpt}"]
    return lines


def _row(archive: Archive, record: Record) -> tuple[object, ...]:
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(archive.saved_s(record.id)))
    title = record.title if len(record.title) <= SHOWN else record.title[: SHOWN - 1] + "…"
    return record.id, saved, record.model, len(record.messages), title


def _facts(archive: Archive, record: Record) -> dict[str, object]:
    return {
        "id": record.id,
        "model": record.model,
        "created": record.created,
        "saved": int(archive.saved_s(record.id)),
        "messages": len(record.messages),
        "title": record.title,
        **({"lossy": record.lossy} if record.lossy else {}),
    }


def _markdown(record: Record) -> str:
    parts = [f"## {message['role']}\n\n{_body(message)}\n" for message in record.dialogue]
    lossy = f", some answers with --lossy {' '.join(record.lossy)}" if record.lossy else ""
    return "\n".join([f"# {record.title}\n", f"{record.model}, {record.id}{lossy}\n", *parts])


def _shown(content: object) -> str:
    return "\n\n".join([*("[image]" for _ in pictures_of(content)), text_in(content)])


def _body(message: Message) -> str:
    """Thoughts as a quotation, the text itself, and calls as code."""
    thoughts, calls = message.get("reasoning_content"), message.get("tool_calls")
    quoted = "\n".join(f"> {line}".rstrip() for line in str(thoughts or "").split("\n")) if thoughts else ""
    functions = [call["function"] for call in calls] if isinstance(calls, list) else []
    called = [f"`→ {function['name']}({function['arguments']})`" for function in functions]
    return "\n\n".join(part for part in (quoted, _shown(message["content"]), *called) if part)
