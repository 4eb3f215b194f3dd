"""What a line that begins with a slash does. A typing mistake never reaches the model: it would cost a slow answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import click

from cli.engine import introduction
from cli.options import BUDGET, NATURAL, SAMPLING_TYPES
from cli.quantities import format_count
from cli.session import Session
from cli.treeview import draw

FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Slash:
    """One command: how it is written, what it promises, what it does."""

    usage: str
    says: str
    run: Callable[[Session, str], None]


def obey(session: Session, line: str) -> None:
    """Carry out one slash command, or say which one was probably meant."""
    name, _, argument = line[1:].strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        meant = f"did you mean /{near[0]}?" if near else "/help lists them."
        session.screen.tell(f"Unknown command /{name}: {meant} Nothing was sent to the model.")
        return
    try:
        command.run(session, argument.strip())
    except click.BadParameter as problem:
        session.screen.tell(problem.message)
    except OSError as problem:
        session.screen.tell(f"{problem.filename}: {problem.strerror}")


def _help(session: Session, _: str) -> None:
    usages = {f"/{command.usage}": command.says for command in COMMANDS.values()}
    width = max(map(len, usages))
    lines = [f"  {usage:<{width}}  {says}" for usage, says in usages.items()]
    session.screen.tell("\n".join([*lines, f"  {'//text':<{width}}  send a line that begins with a slash"]))


def _exit(session: Session, _: str) -> None:
    session.leaving = True


def _clear(session: Session, _: str) -> None:
    session.conversation.clear()
    session.attached.clear()
    session.screen.tell("a new conversation")


def _undo(session: Session, _: str) -> None:
    session.screen.tell("the last exchange is gone" if session.conversation.undo() else "nothing to undo")


def _retry(session: Session, argument: str) -> None:
    if not session.conversation.messages:
        session.screen.tell("nothing to retry")
        return
    session.retry(NATURAL(argument) if argument else None)


def _continue(session: Session, _: str) -> None:
    session.proceed()


def _edit_last(session: Session, _: str) -> None:
    asked = session.last_question
    if asked is None:
        session.screen.tell("nothing to edit")
        return
    edited = click.edit(asked, extension=".md")
    if edited is None or edited.strip() in ("", asked.strip()):
        session.screen.tell("unchanged: nothing was sent to the model")
    else:
        session.ask_again(edited.removesuffix("\n"))


def _copy(session: Session, argument: str) -> None:
    if argument not in ("", "code"):
        raise click.BadParameter("/copy takes the last answer, /copy code its last block of code")
    answers = [message["content"] for message in session.conversation.messages if message["role"] != "user"]
    found = FENCED.findall(answers[-1])[-1:] if argument and answers else answers[-1:]
    if not found:
        session.screen.tell(f"no {argument or 'answer'} to copy")
    elif session.screen.copy(found[0]):
        session.screen.tell(f"{format_count(len(found[0]))} characters are on the clipboard, if the terminal allows it")
    else:
        session.screen.tell("there is no terminal that could copy; /save FILE writes to a file")


def _system(session: Session, argument: str) -> None:
    if argument:
        session.conversation.system = None if argument == "off" else argument
    session.screen.tell(f"system: {session.conversation.system or '(none)'}")


def _set(session: Session, argument: str) -> None:
    key, _, value = argument.partition(" ")
    key, value = key.replace("-", "_"), value.strip()
    if key not in asdict(session.sampling):
        near = get_close_matches(key, asdict(session.sampling), n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}?" if near else "/show lists all."
        raise click.BadParameter(f"/set knows no {key!r}; {meant}")
    session.sampling = replace(session.sampling, **{key: _value(key, value)})  # type: ignore[arg-type]  # _value checks
    session.screen.tell(f"{key} = {getattr(session.sampling, key)}")


def _value(key: str, value: str) -> object:
    if key == "stop":
        return (value,) if value else ()
    if key == "ignore_eos":
        return click.BOOL.convert(value, None, None)
    if key in ("temperature", "top_p", "top_k", "min_p", "seed") and value in ("", "none", "auto"):
        return None  # back to the model's own wish, or to chance
    return SAMPLING_TYPES[key].convert(value, None, None)


def _show(session: Session, _: str) -> None:
    settings = [f"  {key:<19} {value}" for key, value in asdict(session.sampling).items()]
    system = f"  {'system':<19} {session.conversation.system or '(none)'}"
    session.screen.tell("\n".join([*introduction(session.engine), system, *settings]))


def _budget(session: Session, argument: str) -> None:
    before = session.engine.budget
    if argument:
        session.engine.budget = BUDGET(argument)
        session.screen.tell(f"budget {session.engine.budget} (was {before})")
    else:
        session.screen.tell(f"budget {before}")


def _stats(session: Session, argument: str) -> None:
    session.stats = _on_or_off(argument, not session.stats)
    session.screen.tell(f"stats {'on' if session.stats else 'off'}")


def _tree(session: Session, argument: str) -> None:
    if argument:
        session.tree = _on_or_off(argument, session.tree)
        session.screen.tell(f"tree {'on' if session.tree else 'off'}")
    elif session.last is None or session.last.last is None:
        session.screen.tell("no sweep yet; /tree on shows every one as it comes")
    else:
        burst, number = session.last.last, session.last.sweeps
        session.screen.tell(draw(burst, session.engine.decode, session.screen.width, number))


def _tokens(session: Session, _: str) -> None:
    used, context = format_count(session.conversation.tokens_used), format_count(session.engine.context)
    session.screen.tell(f"context {used} of {context} tokens")


def _read(session: Session, argument: str) -> None:
    path = _path(argument, "/read FILE")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise click.BadParameter(f"{path} is not UTF-8 text") from None
    session.attached.append(text)
    session.screen.tell(f"{path}: {format_count(len(text))} characters go before your next message")


def _save(session: Session, argument: str) -> None:
    path = _path(argument, "/save FILE")
    system = session.conversation.system
    messages = ([{"role": "system", "content": system}] if system else []) + session.conversation.messages
    with path.open("x", encoding="utf-8") as file:  # an older conversation is never replaced
        file.writelines(json.dumps(message, ensure_ascii=False) + "\n" for message in messages)
    session.screen.tell(f"{path}: {len(messages)} messages")


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise click.BadParameter(f"which file? {usage}")
    return Path(argument).expanduser()


def _on_or_off(argument: str, otherwise: bool) -> bool:
    return bool(click.BOOL.convert(argument, None, None)) if argument else otherwise


COMMANDS = {
    "help": Slash("help", "this list", _help),
    "exit": Slash("exit", "leave; /bye and Ctrl-D too", _exit),
    "bye": Slash("bye", "leave", _exit),
    "clear": Slash("clear", "start afresh, the system prompt stays", _clear),
    "undo": Slash("undo", "forget the last message and its answer", _undo),
    "retry": Slash("retry [SEED]", "answer the last message again", _retry),
    "continue": Slash("continue", "go on with an answer that was cut short", _continue),
    "edit-last": Slash("edit-last", "change your last message in $EDITOR and ask again", _edit_last),
    "copy": Slash("copy [code]", "the last answer, or its last block of code, to the clipboard", _copy),
    "system": Slash("system [TEXT|off]", "show or change the system prompt", _system),
    "set": Slash("set KEY VALUE", "change how tokens are chosen, such as /set temperature 0.7", _set),
    "show": Slash("show", "the model and all settings", _show),
    "budget": Slash("budget [N|auto]", "guessed tokens checked per sweep; 0 is plain decoding", _budget),
    "stats": Slash("stats [on|off]", "the line below every answer", _stats),
    "tree": Slash("tree [on|off]", "the last sweep's guesses, or those of every sweep", _tree),
    "tokens": Slash("tokens", "how much of the context is used", _tokens),
    "read": Slash("read FILE", "put a file before your next message", _read),
    "save": Slash("save FILE", "write the conversation as JSON lines", _save),
}
