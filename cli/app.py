"""The entry point: finds the command, and is the one place where an error becomes text and an exit code."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pkgutil import resolve_name
from types import FrameType

import click

from cli.shared.control_codes import echo
from cli.shared.errors import INTERNAL, INTERRUPTED, PIPE_CLOSED, TERMINATED, described, exit_code, explain
from cli.shared.settings import NO_SETTINGS, check_environment, defaults_for
from cli.shared.verbosity import Verbosity, start_logging, verbosity_options
from offload.machine.system import check_system

log = logging.getLogger(__name__)

SECTIONS = {
    "Talk": {
        "chat": "cli.chat.command:chat",
        "run": "cli.chat.run:run",
        "repl": "cli.chat.repl:repl",
        "generate": "cli.batch.command:generate",
        "sessions": "cli.chat.sessions:sessions",
        "cache": "cli.chat.prefix_cache:cache",
    },
    "Serve": {
        "serve": "cli.serve.command:serve",
        "ps": "cli.serve.control:ps",
        "stop": "cli.serve.control:stop",
    },
    "Models": {
        "plan": "cli.models.plan:plan",
        "pull": "cli.models.pull:pull",
        "pack": "cli.models.pack:pack",
        "models": "cli.models.command:models",
        "ls": "cli.models.command:list_models",
        "show": "cli.models.command:show_model",
        "rm": "cli.models.command:remove_models",
        "alias": "cli.models.alias:alias",
        "preset": "cli.models.preset:preset",
        "index": "cli.models.index:index",
        "distill": "cli.distill.command:distill",
    },
    "Measure": {
        "doctor": "cli.models.doctor:doctor",
        "bench": "cli.bench.command:bench",
        "check": "cli.bench.check:check",
        "eval": "cli.bench.eval:evaluate",
    },
    "This program": {
        "config": "cli.about.config:config",
        "completion": "cli.about.completion:completion",
        "version": "cli.about.version:version",
    },
}
COMMANDS = {name: place for section in SECTIONS.values() for name, place in section.items()}

_HELP = """Run large language models on a small machine, with exactly the text they would write by themselves.

\b
  specexec chat                                     talk to the built-in demo
  specexec chat -m llama-70b --offload ram          a model larger than the GPU
  specexec generate prompts.jsonl -o out.jsonl      many prompts, one result a line
"""

_EPILOG = "Every option can also be an environment variable, such as SPECEXEC_CHAT_BUDGET=128."


class LazyGroup(click.Group):
    """A group whose commands are imported when they are needed, so that --help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in sections."""
        widest = max(map(len, COMMANDS))
        for section, names in SECTIONS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(section):
                room = formatter.width - 6 - widest
                rows = [(f"{name:<{widest}}", command.get_short_help_str(room)) for name, command in found if command]
                formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name.startswith("-"):
            return None  # click goes on to say what is wrong with the option
        if cmd_name not in COMMANDS:
            near = get_close_matches(cmd_name, COMMANDS, n=1)
            ctx.fail(f"No such command {cmd_name!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
        command = resolve_name(COMMANDS[cmd_name])
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command, with the settings files as its defaults."""
        name, command, rest = super().resolve_command(ctx, args)
        if name and command and name not in NO_SETTINGS:
            check_environment(click.Context(command, ctx, name))
            ctx.default_map = {name: defaults_for(name, command)}
        return name, command, rest

    def invoke(self, ctx: click.Context) -> object:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has had enough (`| head`); caught here because click would call it a bug
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        return code


@click.group(
    cls=LazyGroup,
    help=_HELP,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(package_name="specexec", message="%(prog)s %(version)s")
@verbosity_options
def commands() -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is as documented, and no error leaves as a bare traceback."""
    verbosity = Verbosity()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process: neither read nor written
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - stays open
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a file need not be text; stderr does so by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        check_system()
        code = commands.main(
            arguments, prog_name="specexec", standalone_mode=False, auto_envvar_prefix="SPECEXEC", obj=verbosity
        )
        return code if isinstance(code, int) else 0
    except click.ClickException as refusal:
        if verbosity.json:
            echo(json.dumps({"error": {"code": "usage", "message": refusal.format_message(), "hint": None}}))
        else:
            said = io.StringIO()
            refusal.show(said)
            echo(said.getvalue(), err=True, nl=False)
        return refusal.exit_code
    except (click.Abort, KeyboardInterrupt):
        echo("\nInterrupted.", err=True)
        return INTERRUPTED
    except Exception as error:
        if verbosity.log_file is not None:
            start_logging(verbosity, tell=lambda _: None)
            log.error("%s", explain(error), exc_info=exit_code(error) == INTERNAL)
        if verbosity.traceback:
            echo(traceback.format_exc(), err=True, nl=False)
        if verbosity.json:
            echo(json.dumps({"error": described(error)}, ensure_ascii=False))
        else:
            echo(explain(error, verbosity.log_file), err=True)
        return exit_code(error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)
