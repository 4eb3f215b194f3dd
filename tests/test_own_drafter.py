"""The recipe for a drafter of one's own, followed to the letter; and every list of drafters is the registry's."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

import specexec
import specexec.drafters
from cli.app import commands
from cli.chat.slash import COMMANDS
from cli.shared.options import DRAFTER_HELP
from specexec import SamplingParams
from specexec.drafters import registry
from specexec.drafters.registry import ALONE, REGISTRY, Source, names
from specexec.errors import BadDrafter

ROOT = Path(__file__).parents[1]
SAMPLING = SamplingParams(temperature=0.8, seed=5, max_tokens=24)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's file in a folder of drafters, the page's line in the registry; the name that it has there."""
    page = (ROOT / "docs" / "howto" / "own-drafter.md").read_text(encoding="utf-8")
    file = re.search(r"Whole, as\s+`specexec/drafters/(\w+\.py)`", page)
    module, line = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert file is not None
    (tmp_path / file[1]).write_text(module, encoding="utf-8")
    monkeypatch.setattr(specexec.drafters, "__path__", [*specexec.drafters.__path__, str(tmp_path)])
    ((name, entry),) = eval(f"{{{line}}}", {"Source": Source}).items()
    monkeypatch.setitem(REGISTRY, name, entry)
    return str(name)


def test_the_drafter_of_the_recipe_writes_the_targets_own_text(recipe: str) -> None:
    prompt = "1, 2, 1, 2, 1, 2, 1, 2, 1,"
    with specexec.load("demo", drafter="none", dtype="f32", offload="none") as llm:
        plain = llm.generate(prompt, SAMPLING)
    for drafter in (recipe, f"{recipe}+ngram"):
        with specexec.load("demo", drafter=drafter, dtype="f32", offload="none", budget=16) as llm:
            found = llm.generate(prompt, SAMPLING)
            assert not llm.drafter_failures
            assert recipe in llm.drafter_name
        assert found.tokens == plain.tokens
        assert found.accepted > 0, "guesses are used"


def test_a_name_in_the_registry_is_known_everywhere(recipe: str) -> None:
    assert registry.parse(f"ngram+{recipe}", lambda _: False).sources == ("ngram", recipe)
    assert recipe in COMMANDS["drafter"].words()
    assert recipe in completed("last")
    with pytest.raises(BadDrafter, match=recipe):
        registry.parse("ngrm", lambda _: False)


def completed(begun: str) -> list[str]:
    """What a shell offers behind `specexec chat --drafter`."""
    shell = BashComplete(commands, {}, "specexec", "_SPECEXEC_COMPLETE")
    return [item.value for item in shell.get_completions(["chat", "--drafter"], begun)]


def test_help_completion_and_docs_list_the_drafters_of_the_registry() -> None:
    assert completed("") == names()
    assert completed("sibling+s") == ["sibling+substitute", "sibling+skip"]
    assert [*COMMANDS["drafter"].words()] == names()
    assert all(name in COMMANDS["drafter"].says for name in names())
    assert all(name in DRAFTER_HELP for name in names())
    for command in ("chat", "generate", "serve", "repl", "bench", "check", "eval"):
        found = commands.get_command(click.Context(commands), command)
        assert found is not None
        assert DRAFTER_HELP in [one.help for one in found.params if isinstance(one, click.Option)], command
    page = (ROOT / "docs" / "drafters.md").read_text(encoding="utf-8")
    table = page.split("\n\n| name | guesses with ", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == {*ALONE, *REGISTRY}


def test_every_maker_is_there() -> None:
    from importlib import import_module

    for source in REGISTRY.values():
        module, _, function = source.maker.partition(":")
        assert callable(getattr(import_module(module), function))
