"""`specexec preset`: options of a conversation under one name. Written to the user's settings; loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click

from cli.about.config import changed
from cli.shared.control_codes import echo
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import TEXT_OR_FILE, all_choices, was_chosen
from cli.shared.presets import checked_preset, preset_argument, presets
from cli.shared.presets import preset as one_preset
from cli.shared.settings import PRESETS, options_of, user_file
from cli.shared.thinking import think_option
from cli.shared.verbosity import json_option, verbosity_options


@click.group()
@verbosity_options
def preset() -> None:
    """Keep a model, its drafter, a system prompt and sampling under one name.

    \b
      specexec preset save poet -m llama-70b -b 128 -s "You are a poet." -t 0.9
      specexec chat --preset poet
    """


@preset.command("save", cls=SectionedCommand)
@click.argument("name")
@click.option("-s", "--system", type=TEXT_OR_FILE, help="System prompt, or @FILE, whose text is kept.")
@think_option
@all_choices
@verbosity_options
def save(name: str, **chosen: object) -> None:
    """Keep the options of this line as NAME; one of that name is replaced."""
    if chosen["lossy"]:
        raise click.UsageError("--lossy changes what is written: it is typed each time, and no preset holds it.")
    options = options_of(click.get_current_context().command)
    given = {key: _plain(chosen[str(one.name)]) for key, one in options.items()
             if one.name in chosen and was_chosen(str(one.name))}  # fmt: skip
    if not given:
        raise click.UsageError("Nothing to keep: give the options that the preset shall hold.")
    if not name.strip() or name.startswith("-"):
        raise click.BadParameter(f"{name!r} is no name.")
    if str(given.get("system", "")).startswith("@"):
        raise click.BadParameter("a system prompt that begins with @ would be read as a file's name.")
    checked_preset(name, given, options)
    with changed(user_file()) as document:
        replaced = name in document.setdefault(PRESETS, {})
        document[PRESETS][name] = given
    echo(f"{'replaced' if replaced else 'saved'} {name}  # {user_file()}", err=True)


@preset.command("list")
@json_option()
@verbosity_options
def list_presets(as_json: bool) -> None:
    """List all presets."""
    known = presets()
    if as_json:
        echo(json.dumps(known, ensure_ascii=False, default=str))
        return
    for name, values in known.items():
        echo(f"{name}: {', '.join(_shown(values))}", folded=True)
    if not known:
        echo("no presets yet; specexec preset save NAME keeps one", err=True)


@preset.command("show")
@preset_argument
@json_option()
@verbosity_options
def show(name: str, as_json: bool) -> None:
    """Print what one preset holds."""
    values = one_preset(name)
    echo(json.dumps(values, ensure_ascii=False, default=str) if as_json else "\n".join(_shown(values)))


@preset.command("rm")
@preset_argument
@verbosity_options
def remove(name: str) -> None:
    """Forget one preset."""
    one_preset(name)
    with changed(user_file()) as document:
        del document[PRESETS][name]
    echo(f"removed {name}", err=True)


def _plain(value: object) -> object:
    """A value as TOML has it."""
    return [*value] if isinstance(value, tuple) else value


def _shown(values: Mapping[str, object]) -> list[str]:
    return [f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in values.items()]
