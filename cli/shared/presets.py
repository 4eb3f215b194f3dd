"""Presets: options under one name, kept as [preset.NAME] in the user's settings, and --preset, which uses one."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TypeVar

import click

from cli.shared.control_codes import echo
from cli.shared.errors import BadConfig, PresetNotFound
from cli.shared.settings import PRESETS, Value, check_key, checked_value, known, options_of, user_file

_USED = "specexec.preset"  # in the context: what the running command takes of its preset
Command = TypeVar("Command", bound=Callable[..., object])


def presets() -> dict[str, dict[str, object]]:
    """All presets of the user's settings file, by name. Raises BadConfig for a file or a table that is none."""
    file = user_file()
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8-sig")).get(PRESETS, {}) if file.is_file() else {}
    except (OSError, RecursionError, tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise BadConfig(f"{file} cannot be read: {problem}.", hint="specexec config edit") from None
    if not isinstance(table, dict) or not all(isinstance(one, dict) for one in table.values()):
        raise BadConfig(f"{file}: {PRESETS} holds tables alone.", hint=f'[{PRESETS}.NAME] and, below it, model = "…".')
    return {name: {key.replace("-", "_"): value for key, value in one.items()} for name, one in table.items()}


def preset(name: str) -> dict[str, object]:
    """One of them. Raises PresetNotFound."""
    found = presets()
    if name not in found:
        near = get_close_matches(name, found, n=1)
        hint = f"--preset {near[0]}" if near else f"specexec preset save {name} -m MODEL …"
        raise PresetNotFound(f"there is no preset {name!r}.", hint=hint)
    return found[name]


def checked_preset(name: str, values: Mapping[str, object], options: Mapping[str, click.Option]) -> dict[str, Value]:
    """The values of a preset, by key, as these options take them. Raises BadConfig for one that an option would not."""
    where = f"{user_file()}: {PRESETS}.{name}"
    return {key: checked_value(options[key], value, f"{where}.{key}") for key, value in values.items()}


def _names(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """For the shell's completion, which has nowhere to say what is wrong with a file."""
    try:
        return [name for name in presets() if name.startswith(begun)]
    except BadConfig:
        return []


def _use(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    """Let the preset's values stand where a settings file's would."""
    if name is None:
        return
    values, options = preset(name), options_of(context.command)
    used = {key: value for key, value in values.items() if key in options}
    if rest := [key for key in values if key not in used]:
        for key in rest:
            check_key(key, known(), f"{user_file()}: {PRESETS}.{name}.{key}")
        echo(f"Note: of preset {name} {context.info_name} does not use {', '.join(rest)}.", err=True)
    chosen = {options[key].name: value for key, value in checked_preset(name, used, options).items()}
    context.meta[_USED] = chosen
    context.default_map = {**(context.default_map or {}), **chosen}


def preset_says(parameter: str) -> bool:
    """Whether the preset of the running command decides this one."""
    return parameter in click.get_current_context().meta.get(_USED, {})


preset_argument = click.argument("name", shell_complete=_names)
"""The name of a preset that there is."""


def preset_option(command: Command) -> Command:
    """Add --preset; everything else that is typed, or in the environment, goes before what it holds."""
    return click.option(
        "--preset", metavar="NAME", is_eager=True, expose_value=False, callback=_use, shell_complete=_names,
        help="Options that specexec preset save has kept; those of this line win.",
    )(command)  # fmt: skip
