"""What a line that begins with a slash does. A typing mistake never reaches the model: it would cost a slow answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

import click

from cli.chat import slash_settings as settings
from cli.chat import slash_talk as talk
from cli.chat.room import ON_FULL
from cli.chat.session import Session
from cli.shared.errors import REFUSALS, explain
from cli.shared.thinking import LEVELS
from specexec.drafters.registry import names as drafter_names

ON_OFF = ("on", "off")


@dataclass(frozen=True)
class Slash:
    """One command: how it is written, what it promises, what it does, and what may follow it."""

    usage: str
    says: str
    run: Callable[[Session, str], None]
    words: Callable[[], Iterable[str]] = tuple
    takes_path: bool = False


def obey(session: Session, line: str) -> None:
    """Carry out one slash command, or say which one was probably meant."""
    name, _, argument = line[1:].strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        session.screen.tell(f"Unknown command /{name}: {_meant(name)} Nothing was sent to the model.")
        return
    try:
        command.run(session, argument.strip())
    except click.BadParameter as problem:
        session.screen.tell(problem.message)
    except click.ClickException as problem:  # such as an editor that does not start
        session.screen.tell(problem.format_message())
    except REFUSALS as refusal:
        session.screen.tell(explain(refusal))
    except OSError as problem:
        session.screen.tell(f"{problem.filename}: {problem.strerror}")


def _meant(name: str) -> str:
    near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    return f"did you mean /{near[0]}?" if near else "/help lists them."


def _help(session: Session, argument: str) -> None:
    name = argument.removeprefix("/")
    if name and name not in COMMANDS:
        raise click.BadParameter(f"there is no command /{name}: {_meant(name)}")
    commands = [COMMANDS[name]] if name else [command for command in COMMANDS.values() if command.says]
    usages = {f"/{command.usage}": command.says for command in commands}
    if not name:
        usages["//text"] = "send a line that begins with a slash"
    widest = max(map(len, usages))
    session.screen.tell("\n".join(f"  {usage:<{widest}}  {says}" for usage, says in usages.items()))


COMMANDS: dict[str, Slash] = {
    "help": Slash("help [COMMAND]", "this list", _help, lambda: COMMANDS),
    "exit": Slash("exit", "leave; /quit, /bye and Ctrl-D too", talk.leave),
    "quit": Slash("quit", "", talk.leave),
    "bye": Slash("bye", "", talk.leave),
    "clear": Slash("clear", "begin another conversation; this one is kept, the system prompt stays", talk.clear),
    "undo": Slash("undo", "forget the last message and its answer", talk.undo),
    "retry": Slash("retry [SEED]", "answer the last message again", talk.retry),
    "continue": Slash("continue", "continue an answer that was cut short", talk.proceed),
    "edit": Slash("edit", "write a message in $EDITOR", talk.edit),
    "edit-last": Slash("edit-last", "change your last message in $EDITOR and ask again", talk.edit_last),
    "read": Slash("read FILE", "put a file before your next message", talk.read, takes_path=True),
    "copy": Slash(
        "copy [code]", "the last answer, or its last block of code, to the clipboard", talk.copy, lambda: ("code",)
    ),
    "save": Slash("save [FILE]", "write the conversation as JSON lines", talk.save, takes_path=True),
    "load": Slash("load ID", "continue another conversation", talk.load, talk.kept_ids),
    "sessions": Slash("sessions", "the conversations that /load can take up", talk.sessions),
    "search": Slash("search WORDS", "the conversations in which all of these occur", talk.search),
    "system": Slash("system [TEXT|off]", "show or change the system prompt", talk.system, lambda: ("off",)),
    "set": Slash(
        "set KEY VALUE", "change how tokens are chosen, such as /set temperature 0.7", settings.set_value, settings.keys
    ),
    "show": Slash(
        "show [WHAT]", "model, sampling, plan, template or prompt; model and sampling if left out", settings.show,
        lambda: settings.VIEWS,
    ),
    "model": Slash("model [NAME]", "continue with another model", settings.model, settings.model_names),
    "drafter": Slash(
        "drafter [NAME]", f"load the model again with another drafter: {', '.join(drafter_names())} or a model",
        settings.drafter, drafter_names,
    ),
    "budget": Slash(
        "budget [N|auto]", "guessed tokens checked per sweep; 0 is plain decoding", settings.budget, lambda: ("auto",)
    ),
    "stats": Slash(
        "stats [on|off|long]", "the line below every answer; long is where the last one's time went", settings.stats,
        lambda: (*ON_OFF, "long"),
    ),
    "tree": Slash("tree [on|off]", "the last sweep's guesses, or those of every sweep", settings.tree, lambda: ON_OFF),
    "think": Slash(
        "think [on|off|auto|hide|show]", "how much to think, low to high too, or hide it; alone: the last thoughts",
        settings.think, lambda: (*LEVELS, "hide", "show"),
    ),
    "markdown": Slash("markdown [on|off]", "draw Markdown, or show it as written", settings.markdown, lambda: ON_OFF),
    "tools": Slash("tools", "the tools that the model may call, by MCP server", settings.tools),
    "tokens": Slash("tokens", "how much of the context is used", settings.tokens),
    "on-full": Slash(
        "on-full [WHAT]", f"what is done when it is full: {', '.join(ON_FULL)}", settings.on_full, lambda: ON_FULL
    ),
}  # fmt: skip
