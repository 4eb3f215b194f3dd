"""Settings files: TOML, the user's own and one of the current folder. Knows which keys exist and refuses others.

A key at the top holds for every command that has the option, one in a table for that command alone:

    model = "llama-70b"
    [chat]
    temperature = 0.7
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

import click

from cli.shared.errors import BadConfig
from offload.hub import names

LOCAL = "specexec.toml"
ALIASES = "alias"  # short names of models, which offload reads
PRESETS = "preset"  # options under one name (presets.py)
NO_SETTINGS = {
    "config",
    "completion",
    "version",
    "models",
    "sessions",
    "cache",
    "alias",
    "preset",
    "distill",
    "ls",
    "show",
    "rm",
}
# Not settings: what to do now, rather than how.
UNFIT = {"help", "preset", "positional_model", "resume", "session", "prompt", "prompts", "images", "output", "as_json"}
UNFIT |= (TYPED_EACH_TIME := {"lossy"})  # what changes a text is asked for where it is written

# What runs programs or sends words away: not for a folder that another user may have filled.
_OWN_FILE_ONLY = {"trust_remote_code", "notify_command", "connect", "mcp", "mcp_allow", "yes"}

# What every command that loads a model once had, and one has now.
ONE_HOME = {"planner": "bench"}

Value: TypeAlias = str | int | float | bool | list[str]


@dataclass(frozen=True)
class Setting:
    """One value and the file that says it."""

    key: str
    value: Value
    origin: Path


def user_file() -> Path:
    """The user's own settings, whether they exist or not."""
    return names.user_file()


def files() -> list[Path]:
    """Settings files in the order in which they overrule each other, the strongest last."""
    return [path for path in (user_file(), Path(LOCAL)) if path.is_file()]


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Keys that a settings file may hold for a command, as its options are typed, and the options they stand for."""
    options = [one for one in command.params if isinstance(one, click.Option) and one.name not in UNFIT]
    return {_typed(one).replace("-", "_"): one for one in options}


def _typed(option: click.Option) -> str:
    """An option's first long name; further ones are what other programs call it."""
    return next((name for name in option.opts if name.startswith("--")), option.opts[0]).lstrip("-")


def read(path: Path) -> list[Setting]:
    """All settings of one file, with dotted keys."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise BadConfig(f"{path} is nested too deeply.", hint="specexec config edit") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise BadConfig(f"{path} is not TOML: {problem}.", hint="specexec config edit") from None
    settings = []
    for key, value in table.items():
        if key == ALIASES or (key == PRESETS and path != Path(LOCAL)):
            continue
        inner = value.items() if isinstance(value, dict) else None
        for dotted, one in [(key, value)] if inner is None else [(f"{key}.{name}", one) for name, one in inner]:
            if isinstance(one, dict) or not isinstance(one, str | int | float | bool | list):
                raise BadConfig(f"{path}: {dotted} must be a text, a number, true, false or a list of texts.")
            setting = Setting(dotted.replace("-", "_"), one, path)
            if path == Path(LOCAL) and setting.key.rpartition(".")[2] in _OWN_FILE_ONLY:
                raise BadConfig(
                    f"./{LOCAL} sets {dotted}; only your own settings file may say so.",
                    "This folder could be another user's, and the setting runs programs or sends words away.",
                    f"the option on the command line, or specexec config set {dotted} ...",
                )
            settings.append(setting)
    return settings


def check_key(key: str, options: Mapping[str, Collection[str]], where: str) -> None:
    """Raises BadConfig for a key that no command would ever read."""
    command, dot, name = key.rpartition(".")
    _check_home(name, command, f"{where}: {key}")
    if dot and command not in options:
        near = get_close_matches(command, options, n=1)
        raise BadConfig(f"{where}: there is no command {command!r}.", hint=f"[{near[0]}]" if near else None)
    keys = options[command] if dot else set().union(*options.values())
    if name not in keys:
        near = get_close_matches(name, keys, n=1)
        raise BadConfig(
            f"{where}: {key} is no option{f' of {command}' if dot else ''}.", hint=near[0] if near else None
        )


def _check_home(name: str, command: str, where: str) -> None:
    """Raises BadConfig for an option that other commands have lost, and for one that is kept nowhere."""
    if name in TYPED_EACH_TIME:
        raise BadConfig(f"{where}: --{name} changes what is written, so it is typed each time.", hint="leave it out")
    home = ONE_HOME.get(name)
    if home and command != home:
        only = f"--{name} is an option of `specexec {home}` alone, which compares."
        raise BadConfig(f"{where}: {only}", hint=f"{home}.{name}, or leave it out")


def known() -> dict[str, dict[str, click.Option]]:
    """The keys of every command that settings are for, by command. Needs the context of a running command line."""
    context = click.get_current_context().find_root()
    group = context.command
    assert isinstance(group, click.Group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context) if name not in NO_SETTINGS}
    return {name: options_of(command) for name, command in found.items() if command}


def defaults_for(name: str, command: click.Command) -> dict[str, Value]:
    """What the files say about one command, the nearer file and the command's own table winning.

    Raises BadConfig for what no command would read, and for values that the command's options would not take.
    """
    options, chosen = options_of(command), dict[str, Value]()
    for own in (False, True):
        for path in files():
            for setting in read(path):
                table, dot, key = setting.key.rpartition(".")
                if bool(dot) != own:
                    continue
                if table not in ("", name) or (key not in options and not dot):
                    check_key(setting.key, known(), str(path))
                    continue
                check_key(setting.key, {name: options}, str(path))
                chosen[options[key].name] = checked_value(options[key], setting.value, f"{path}: {setting.key}")
    return chosen


def check_environment(context: click.Context) -> None:
    """Refuse variables in the name of the context's command that it would not read, and values that it would not take.

    Click itself would complain of an option that was not typed.
    """
    options = {one.name.upper(): one for one in context.command.params if isinstance(one, click.Option)}
    prefix = f"{context.auto_envvar_prefix}_"
    for variable in sorted(os.environ):
        name = variable.removeprefix(prefix)
        if name == variable:
            continue
        _check_home(name.lower(), str(context.info_name), f"{variable} in the environment")
        if name not in options:
            near = get_close_matches(name, options, n=1)
            raise BadConfig(
                f"{variable} in the environment is no option of {context.info_name}.",
                hint=prefix + near[0] if near else None,
            )
        value = options[name].value_from_envvar(context)
        if value is not None:
            check_value(options[name], value, f"{variable} in the environment")


def checked_value(option: click.Option, value: object, where: str) -> Value:
    """The value as a file holds it; a text alone will do for an option that may be repeated. Raises BadConfig."""
    if isinstance(value, dict) or not isinstance(value, str | int | float | bool | list):
        raise BadConfig(f"{where} must be a text, a number, true, false or a list of texts.")
    value = [value] if option.multiple and isinstance(value, str) else value
    check_value(option, value, where)
    return value


def check_value(option: click.Option, value: object, where: str) -> object:
    """The value as the option takes it. Raises BadConfig if it does not; `where` names where it was set."""
    if isinstance(value, list | tuple) != option.multiple:
        raise BadConfig(f"{where} {'is a list of texts' if option.multiple else 'is one value, not a list'}.")
    if isinstance(value, bool) and not option.is_flag:
        raise BadConfig(f"{where} is a value, not {json.dumps(value)}.")
    try:
        return option.type_cast_value(click.Context(click.Command(None)), value)
    except click.BadParameter as problem:
        raise BadConfig(f"{where}: {problem.message}") from None
