"""Settings files: TOML, the user's own and one of the folder we are in. Knows which keys exist, and says no to others.

A key at the top holds for every command that has the option, one in a table for that command alone:

    model = "llama-70b"
    [chat]
    temperature = 0.7
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

import click

from cli.errors import BadConfig
from offload import names

LOCAL = "specexec.toml"
ALIASES = "alias"  # short names of models, which offload reads
# Not settings: what to do now, rather than how.
UNFIT = {"help", "positional_model", "resume", "session", "prompt", "prompts", "output", "as_json"}

# What runs programs or sends words away: not for a folder that somebody else may have filled.
_OWN_FILE_ONLY = {"trust_remote_code", "notify_command", "connect"}

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


def options_of(command: click.Command) -> dict[str, str]:
    """Keys that a settings file may hold for a command, as its options are typed, and the parameters they stand for."""
    options = [one for one in command.params if isinstance(one, click.Option) and one.name and one.name not in UNFIT]
    return {max(one.opts, key=len).lstrip("-").replace("-", "_"): one.name for one in options if one.name}


def read(path: Path) -> list[Setting]:
    """All settings of one file, with dotted keys."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise BadConfig(f"{path} is not TOML: {problem}.", hint="specexec config edit") from None
    settings = []
    for key, value in table.items():
        if key == ALIASES:
            continue
        inner = value.items() if isinstance(value, dict) else None
        for dotted, one in [(key, value)] if inner is None else [(f"{key}.{name}", one) for name, one in inner]:
            if isinstance(one, dict) or not isinstance(one, str | int | float | bool | list):
                raise BadConfig(f"{path}: {dotted} must be a text, a number, true, false or a list of texts.")
            setting = Setting(dotted.replace("-", "_"), one, path)
            if path == Path(LOCAL) and setting.key.rpartition(".")[2] in _OWN_FILE_ONLY:
                raise BadConfig(
                    f"./{LOCAL} sets {dotted}; only your own settings file may say so.",
                    "This folder could be somebody else's, and the setting runs programs or sends words away.",
                    f"the option on the command line, or specexec config set {dotted} ...",
                )
            settings.append(setting)
    return settings


def check_key(key: str, known: Mapping[str, Collection[str]], where: str) -> None:
    """Raises BadConfig for a key that no command would ever read."""
    command, dot, name = key.rpartition(".")
    if dot and command not in known:
        near = get_close_matches(command, known, n=1)
        raise BadConfig(f"{where}: there is no command {command!r}.", hint=f"[{near[0]}]" if near else None)
    names = known[command] if dot else set().union(*known.values())
    if name not in names:
        near = get_close_matches(name, names, n=1)
        raise BadConfig(
            f"{where}: {key} is no option{f' of {command}' if dot else ''}.", hint=near[0] if near else None
        )


def defaults_for(name: str, command: click.Command) -> dict[str, Value]:
    """What the files say about one command, the nearer file and the command's own table winning."""
    known, chosen = options_of(command), dict[str, Value]()
    for own in (False, True):
        for path in files():
            for setting in read(path):
                table, dot, option = setting.key.rpartition(".")
                if bool(dot) != own or (dot and table != name):
                    continue
                if dot:
                    check_key(setting.key, {name: known}, str(path))
                if option in known:
                    chosen[known[option]] = setting.value
    return chosen
