"""Every option of every command: the flag, the environment variable and the settings file say the same thing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from cli.app import commands, main
from cli.bench.command import Several
from cli.shared.settings import NO_SETTINGS, TYPED_EACH_TIME, UNFIT, defaults_for, user_file
from cli.shared.verbosity import Verbosity

# What does something, and whose answer is what it did; everything else reports, and can do so in JSON.
DOING = {
    "repl", "index", "completion",
    "alias", "alias set", "alias rm", "preset", "preset save", "preset rm", "config", "config set", "config edit",
    "sessions", "sessions export", "sessions rm", "cache", "cache limit", "cache clear", "distill",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A command and the words that lead to it."""

    words: tuple[str, ...]
    command: click.Command

    @property
    def options(self) -> list[click.Option]:
        return [one for one in self.command.params if isinstance(one, click.Option)]


def places(group: click.Group = commands, words: tuple[str, ...] = ()) -> Iterator[Place]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield Place((*words, name), command)
        if isinstance(command, click.Group):
            yield from places(command, (*words, name))


PLACES = list(places())


def sample(kind: click.ParamType[object], file: Path) -> str:
    """Words that an option of this kind takes, and that are hardly its default."""
    if isinstance(kind, Several):
        return sample(kind.kind, file)
    if isinstance(kind, click.Choice):
        return str([*kind.choices][-1])
    if isinstance(kind, click.IntRange | click.FloatRange):
        middling = 1 if isinstance(kind, click.FloatRange) and kind.max == 1 else 3
        return str(min(middling, kind.max) if kind.max is not None else max(middling, kind.min or 0))
    if isinstance(kind, click.Path):
        return str(file.parent if not kind.file_okay else file)
    named = {"size": "10GiB", "speed": "4MB/s", "n": "8k", "auto|N": "7", "integer": "3", "float": "3.5"}
    named |= {"name=value": "name=3", "json|@file": '{"type": "string"}'}
    named["steps=n|prompt=x|kv=x"] = "steps=7"
    named |= {"grammar|@file": 'start: "a"', "n,n,…": "1,2,3"}
    named["auto|cpu|cuda[:N]"] = "cuda"
    return named.get(kind.name, "2/3" if kind.name.upper() == "K/N" else "words")


def flagged(option: click.Option, file: Path) -> tuple[list[str], str]:
    """How the option is typed, and the same as one word."""
    if option.count:
        return [option.opts[-1]] * 2, "2"
    if option.is_flag:
        return ([option.secondary_opts[-1]], "false") if option.secondary_opts else ([option.opts[-1]], "true")
    word = sample(option.type, file)
    return [option.opts[-1], word], word


def parsed(
    place: Place, arguments: list[str], file: Path, besides: click.Option | None = None, defaults: object = None
) -> object:
    """What the command would be given."""
    verbosity = Verbosity()
    context = click.Context(
        commands, info_name="specexec", auto_envvar_prefix="SPECEXEC", obj=verbosity, **commands.context_settings
    )
    for word in place.words[:-1]:
        context = click.Context(commands, parent=context, info_name=word)
    needed: list[str] = []
    subcommand = ["list"] if isinstance(place.command, click.Group) else []
    for parameter in place.command.params:
        if isinstance(parameter, click.Argument) and parameter.required:
            needed.append(sample(parameter.type, file))
        elif parameter.required and parameter is not besides:
            assert isinstance(parameter, click.Option)
            needed += flagged(parameter, file)[0]
    made = place.command.make_context(
        place.words[-1], [*needed, *arguments, *subcommand], parent=context,
        default_map=defaults, ignore_unknown_options=False,
    )  # fmt: skip
    return dict(made.params), vars(verbosity)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: " ".join(place.words))
def test_every_option_is_also_an_environment_variable(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("words\n")
    assert main(["preset", "save", "words", "--think", "auto", "-q"]) == 0
    for option in place.options:
        if option.name in TYPED_EACH_TIME:
            continue
        typed, word = flagged(option, file)
        variable = "_".join(["SPECEXEC", *place.words, option.name or ""]).upper().replace("-", "_")
        with monkeypatch.context() as patch:
            patch.setenv(variable, word)
            assert parsed(place, [], file, option) == parsed(place, typed, file, option), variable


@pytest.mark.parametrize("place", [one for one in PLACES if one.words[0] not in NO_SETTINGS], ids=lambda p: p.words[0])
def test_every_option_can_be_set_in_the_settings_file(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("words\n")
    (command,) = place.words
    for option in place.options:
        if option.name in UNFIT:
            continue
        typed, word = flagged(option, file)
        first = next(one for one in option.opts if one.startswith("--"))
        key = f"{command}.{first.lstrip('-')}"  # as it is typed, and nothing else
        assert main(["config", "set", key, word, "-q"]) == 0, key
        defaults = defaults_for(command, place.command)
        assert parsed(place, [], file, option, defaults) == parsed(place, typed, file, option), key
        user_file().unlink()


def test_what_reports_can_report_in_json() -> None:
    lacking = {" ".join(one.words) for one in PLACES if not any(each.name == "as_json" for each in one.options)}
    assert lacking == DOING
