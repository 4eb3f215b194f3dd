"""LoadOptions: every field is documented, checked, and reached from the command line."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import get_args

import click
import pytest

import offload
import specexec
from cli.app import commands, main
from cli.shared.options import TYPED, engine_options
from cli.shared.settings import user_file
from specexec import LoadOptions
from specexec.compose import load_options
from specexec.compose.load_options import ALLOWED

NAMES = [field.name for field in fields(LoadOptions)]
API_ONLY: set[str] = set()  # what the command line has no option for, and its documentation says so


def documented() -> set[str]:
    """Fields with a sentence below them."""
    (body,) = (
        node.body
        for node in ast.walk(ast.parse(inspect.getsource(load_options)))
        if isinstance(node, ast.ClassDef) and node.name == "LoadOptions"
    )
    pairs = pairwise(body)
    return {
        one.target.id
        for one, after in pairs
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr)
    }


def test_every_field_says_what_it_is_for() -> None:
    assert documented() == {*NAMES}


def test_every_field_is_an_option_of_every_command_that_loads() -> None:
    @click.command()
    @engine_options
    def some(engine_options: object) -> None: ...

    wanted = {TYPED.get(name, name) for name in NAMES if name not in API_ONLY}
    for command in (some, *(commands.get_command(click.Context(commands), name) for name in ("chat", "serve", "eval"))):
        assert command is not None
        assert wanted <= {one.name for one in command.params}, command.name


def test_what_a_field_may_be_is_what_offload_knows() -> None:
    assert ALLOWED["offload"] == get_args(offload.Offload)
    assert ALLOWED["kv"] == get_args(offload.KVHome)
    assert ALLOWED["drafter_quant"] == get_args(offload.FewBits)
    assert ALLOWED["head_quant"] == get_args(offload.FourBits)


def test_options_are_made_without_torch() -> None:
    code = "import sys, specexec; specexec.LoadOptions(ctx=8); assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_keywords_win_over_options() -> None:
    with specexec.load("demo", LoadOptions(drafter="none", ctx=64, dtype="f32"), ctx=32, offload="none") as llm:
        assert (llm.context, llm.sources, llm.dtype) == (32, "none", "float32")


@pytest.mark.parametrize("line", ['planner = "beam"', '[chat]\nplanner = "beam"'])
def test_settings_that_still_name_a_planner_say_where_it_went(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path))
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(line + "\n")
    assert main(["chat", "-p", "hello"]) == 2
    assert "--planner is an option of `specexec bench` alone" in capsys.readouterr().err


def test_a_variable_that_still_names_a_planner_says_where_it_went(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECEXEC_CHAT_PLANNER", "beam")
    assert main(["chat", "-p", "hello"]) == 2
    assert "--planner is an option of `specexec bench` alone" in capsys.readouterr().err
    assert main(["chat", "--planner", "beam"]) == 2
