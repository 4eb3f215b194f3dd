"""`specexec config`: see and change the settings files. Loads nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cli.shared.control_codes import echo
from cli.shared.errors import BadConfig
from cli.shared.settings import LOCAL, Value, check_key, check_value, files, known, read, user_file
from cli.shared.verbosity import json_option, verbosity_options
from offload.machine.atomic_write import PRIVATE, replacing


@click.group()
@verbosity_options
def config() -> None:
    """Show or change the settings that replace the options' defaults.

    \b
      specexec config set model llama-70b
      specexec config set chat.temperature 0.7

    A flag overrules an environment variable, that overrules ./specexec.toml, and that your own file.
    """


@config.command("path")
@json_option()
@verbosity_options
def path(as_json: bool) -> None:
    """Print where your settings file is, or would be."""
    echo(json.dumps({"path": str(user_file())}) if as_json else user_file())


@config.command("show")
@json_option()
@verbosity_options
def show(as_json: bool) -> None:
    """Print every setting and the file it comes from."""
    options = known()
    settings = {}
    for file in files():
        for setting in read(file):
            check_key(setting.key, options, str(file))
            settings[setting.key] = setting
    if as_json:
        table = {key: {"value": one.value, "origin": str(one.origin)} for key, one in settings.items()}
        echo(json.dumps(table, ensure_ascii=False))
        return
    for key, one in settings.items():
        echo(f"{key} = {json.dumps(one.value, ensure_ascii=False)}  # {one.origin}")
    if not settings:
        echo(f"nothing is set; {user_file()} and ./{LOCAL} are read", err=True)


@config.command("get")
@click.argument("key")
@json_option()
@verbosity_options
def get(key: str, as_json: bool) -> int:
    """Print the value of KEY; exit code 1 if it is not set."""
    key = key.replace("-", "_")
    check_key(key, known(), "config get")
    values = [setting.value for file in files() for setting in read(file) if setting.key == key]
    if not values:
        return 1
    as_it_is = isinstance(values[-1], str) and not as_json
    echo(values[-1] if as_it_is else json.dumps(values[-1], ensure_ascii=False))
    return 0


@config.command("set")
@click.argument("key")
@click.argument("value")
@verbosity_options
def set_value(key: str, value: str) -> None:
    """Set KEY, such as model or chat.temperature, in your settings file. Comments in it stay."""
    key = key.replace("-", "_")
    check_key(key, known(), "config set")
    parsed = _parsed(key, value)
    table, dot, name = key.rpartition(".")
    file = user_file()
    with changed(file) as document:
        if dot:
            document.setdefault(table, {})[name] = parsed
        else:
            document[name] = parsed
    echo(f"{key} = {json.dumps(parsed, ensure_ascii=False)}  # {file}", err=True)


@config.command("edit")
@verbosity_options
def edit() -> None:
    """Open your settings file in $VISUAL or $EDITOR."""
    file = user_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with replacing(file, PRIVATE) as fresh:
            fresh.write(b'# model = "llama-70b"\n# [chat]\n# temperature = 0.7\n')
    click.edit(filename=str(file), editor=os.environ.get("VISUAL") or os.environ.get("EDITOR"))
    for setting in read(file):
        check_key(setting.key, known(), str(file))


@contextmanager
def changed(file: Path) -> Iterator[MutableMapping[str, Any]]:
    """The tables of a settings file, to be changed; it is written when the block ends, and comments stay."""
    import tomlkit
    from tomlkit.exceptions import ParseError

    try:
        document = tomlkit.parse(file.read_text(encoding="utf-8-sig") if file.exists() else "")
    except ParseError as problem:
        raise BadConfig(f"{file} is not TOML: {problem}.", hint="specexec config edit") from None
    yield document
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, PRIVATE) as unfinished:
        unfinished.write(tomlkit.dumps(document).encode())


def _parsed(key: str, text: str) -> Value:
    """The text as the option understands it: what click would refuse is refused now, not at the next run."""
    table, _, name = key.rpartition(".")
    options = known()
    option = next(options[one][name] for one in ([table] if table else options) if name in options[one])
    value = check_value(option, [text] if option.multiple else text, key)
    if option.multiple:
        return [text]
    return value if isinstance(value, bool | int | float) and not isinstance(option.type, click.Path) else text
