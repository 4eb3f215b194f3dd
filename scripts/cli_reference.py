"""Write docs/cli.md from the commands themselves. With --check, only say whether it is up to date."""

import sys
from pathlib import Path

import click

from cli.app import commands

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
OPENING = """# The command line

Made by `python scripts/cli_reference.py` from the commands themselves; a test keeps it true.

A flag overrules an environment variable (`SPECEXEC_CHAT_BUDGET=128` is `specexec chat --budget 128`), that overrules
`./specexec.toml`, that your own settings file (`specexec config path`), and that the default.

Sizes have a unit: `24GiB`, `24G` (the same) or `25GB` (billions); speeds are `4MB/s` or `25GB/s`. A number without one
counts bytes and is refused below a million, because `--ram 24` is most likely meant as `24GiB`.

| exit code | meaning | | exit code | meaning |
|---:|---|---|---:|---|
| 0 | done | | 6 | a device or a server is missing |
| 1 | a bug of ours | | 7 | bad input: empty, too long, a broken line |
| 2 | wrong usage | | 8 | a batch finished, some of its items failed |
| 3 | a model, file or conversation is not there | | 9 | the output exists, or the port is taken |
| 4 | a model is damaged or unsupported | | 130, 143 | Ctrl-C, SIGTERM; what was done is kept |
| 5 | not enough memory or disk | | 141 | the reader of our output has gone |
"""


def page() -> str:
    """The whole reference."""
    root = click.Context(commands, info_name="specexec", terminal_width=100, **commands.context_settings)
    sections = [OPENING, *_sections(commands, root)]
    return "\n".join(sections)


def _sections(command: click.Command, context: click.Context) -> list[str]:
    help_text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    sections = [f"## {context.command_path}\n\n```text\n{help_text}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                sections += _sections(inner, click.Context(inner, info_name=name, parent=context))
    return sections


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/cli.md is not up to date: python scripts/cli_reference.py")


if __name__ == "__main__":
    main()
