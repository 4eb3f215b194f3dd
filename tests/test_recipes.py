"""The recipes of CONTRIBUTING.md work: their blocks are applied to a copy of the source, whose tests then run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("cli", "specexec", "offload", "tests", "scripts", "docs", "pyproject.toml", "CONTRIBUTING.md")
# What each recipe's tests are called.
RECIPES = {
    "A checkpoint format": r"test_rows4\.py::",
    "An architecture": r"test_architectures\.py::.*granite",
    "A chat format": r"test_acme\.py::",
    "A server endpoint": r"test_serve_version\.py::",
    "A command": r"test_cli_where\.py::",
}
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"(New\s+file|[Ii]n)\s+`([\w/.]+)`")


def recipe(name: str) -> str:
    """The section of CONTRIBUTING.md with this heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition(f"\n### {name}\n")[2].partition("\n### ")[0].partition("\n## ")[0]


def apply(section: str, folder: Path) -> None:
    """Do what a reader does: make the new files and change the others, each block where the text before it says."""
    for block in BLOCK.finditer(section):
        new, path = PLACE.findall(section[: block.start()])[-1]
        file, (kind, text) = folder / path, block.groups()
        if kind == "python":
            assert new.startswith("New"), path
            assert not file.exists(), path
            file.write_text(text, encoding="utf-8")
            continue
        lines = [(line[:1], line[1:]) for line in text.splitlines(keepends=True)]
        before, after = ("".join(line for sign, line in lines if sign != other) for other in "+-")
        source = file.read_text(encoding="utf-8")
        assert source.count(before) == 1, f"{path} does not have once:\n{before}"
        file.write_text(source.replace(before, after), encoding="utf-8")


def run(folder: Path, *command: str) -> str:
    """A command in the copy, whose modules go before the installed ones."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source to which all recipes were applied."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name in RECIPES:
        apply(recipe(name), folder)
    return folder


@pytest.fixture(scope="module")
def passed(followed: Path) -> list[str]:
    """The tests of all recipes, which pass; in one process, because most of their time is its start."""
    files = [f"tests/{name}.py" for name in ("test_rows4", "test_acme", "test_serve_version", "test_cli_where")]
    chosen = "granite or rows4 or acme or serve_version or cli_where"
    tests = ["tests/test_architectures.py", *files]
    return run(followed, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", chosen, *tests).splitlines()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_brings_what_its_test_promises(name: str, passed: list[str]) -> None:
    own = [line for line in passed if re.search(RECIPES[name], line)]
    assert own
    assert all(" PASSED" in line for line in own), own


def test_what_recipes_bring_is_as_clean_as_the_rest(followed: Path) -> None:
    run(followed, "-m", "ruff", "check", "-q", ".")
    run(followed, "-m", "ruff", "format", "-q", "--check", ".")


def test_the_last_step_of_a_command_writes_the_reference_and_the_maps(followed: Path) -> None:
    run(followed, "scripts/cli_reference.py")
    run(followed, "scripts/house_map.py")
    assert "## specexec where" in (followed / "docs" / "cli.md").read_text(encoding="utf-8")
    assert "cli/about/where.py" in (followed / "docs" / "map.md").read_text(encoding="utf-8")


def test_every_recipe_with_blocks_is_followed_here() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## Recipes\n")[2].partition("\n## ")[0]
    with_blocks = [name for name in re.findall(r"^### (.+)$", text, re.MULTILINE) if BLOCK.search(recipe(name))]
    assert set(with_blocks) - {"A drafter"} == RECIPES.keys()
