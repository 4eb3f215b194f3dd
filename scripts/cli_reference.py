"""Write docs/cli.md and the man page from the commands. With --check, only say whether they are up to date."""

import re
import sys
from pathlib import Path

import click

from cli.app import commands

DOCS = Path(__file__).parent.parent / "docs"
SETTINGS = """\
A flag overrules an environment variable (`SPECEXEC_CHAT_BUDGET=128` is `specexec chat --budget 128`), that overrules
`./specexec.toml`, that your own settings file (`specexec config path`), and that the default.

Sizes have a unit: `24GiB`, `24G` (the same) or `25GB` (billions); speeds are `4MB/s` or `25GB/s`. A number without one
counts bytes and is refused below a million, because `--ram 24` is most likely meant as `24GiB`.
"""
EXITS = {
    "0": "done",
    "1": "a bug of ours",
    "2": "wrong usage",
    "3": "a model, file or conversation is not there",
    "4": "a model is damaged or unsupported",
    "5": "not enough memory or disk",
    "6": "a device or a server is missing",
    "7": "bad input: empty, too long, a broken line",
    "8": "a batch finished, some of its items failed",
    "9": "the output exists, or the port is taken",
    "130, 143": "Ctrl-C, SIGTERM; what was done is kept",
    "141": "the reader of our output has gone",
}
OPENING = """# The command line

Made by `python scripts/cli_reference.py` from the commands themselves; a test keeps it true.
"""


def page() -> str:
    """The whole reference."""
    codes, half = [f"{code} | {meaning}" for code, meaning in EXITS.items()], len(EXITS) // 2
    table = ["| exit code | meaning | | exit code | meaning |", "|---:|---|---|---:|---|"]
    table += [f"| {left} | | {right} |" for left, right in zip(codes[:half], codes[half:], strict=True)]
    helps = [f"## {path}\n\n```text\n{said}\n```\n" for path, said in _helps(100)]
    return "\n".join([OPENING, SETTINGS, *table, "", *helps])


def manual() -> str:
    """The same as a man page."""
    lines = ['.TH SPECEXEC 1 "" specexec', ".SH NAME", r"specexec \- run large language models on a small machine"]
    for path, said in _helps(78):
        lines += [".SH SYNOPSIS" if path == "specexec" else f".SH {path.upper()}", ".nf", _roff(said), ".fi"]
    lines += [".SH SETTINGS", ".PP", _roff(SETTINGS.replace("`", "")).replace("\n\n", "\n.PP\n").strip()]
    lines += [".SH EXIT STATUS", *(f".TP\n.B {code}\n{_roff(meaning)}" for code, meaning in EXITS.items())]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    """Text as troff prints it as it is."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"(?m)^(?=[.'])", r"\&", escaped)


def _helps(width: int) -> list[tuple[str, str]]:
    """Every command and its --help, groups before what is in them."""
    root = click.Context(commands, info_name="specexec", terminal_width=width, **commands.context_settings)
    return _below(commands, root)


def _below(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    help_text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    found = [(context.command_path, help_text)]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                found += _below(inner, click.Context(inner, info_name=name, parent=context))
    return found


def main() -> None:
    for name, text in (("cli.md", page()), ("specexec.1", manual())):
        file = DOCS / name
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif file.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{name} is not up to date: python scripts/cli_reference.py")


if __name__ == "__main__":
    main()
