"""Documents that can go stale are checked against what they describe."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli.app import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = ("cli", "specexec", "offload", "tests", "scripts", "findings")


def test_the_command_reference_is_what_the_commands_say() -> None:
    ran = subprocess.run(
        [sys.executable, "scripts/cli_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_maps_of_the_house_are_what_docstrings_say() -> None:
    ran = subprocess.run([sys.executable, "scripts/house_map.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_map_of_the_house_names_every_folder_and_module_and_no_other() -> None:
    files = {
        file.relative_to(ROOT) for package in ("cli", "specexec", "offload") for file in (ROOT / package).rglob("*.py")
    }
    folders = {str(file.parent) for file in files}
    map_page = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:\*\*)?\[`(.*?)`\]", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(folders) == sorted(re.findall(r"^## (\S+)$", map_page, re.MULTILINE))
    linked = {Path(name) for name in re.findall(r"\]\(\.\./([\w/.]+\.py)\)", map_page)}
    assert linked == {file for file in files if file.name != "__init__.py"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "howto").glob("*.md")), ids=lambda page: page.name)
def test_a_how_to_fits_on_a_screen(page: Path) -> None:
    text = re.sub(r"^```python\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(text.splitlines()) <= 60


def test_measured_pages_are_listed() -> None:
    folder = ROOT / "docs" / "measured"
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert sorted([*listed, "README.md"]) == sorted(page.name for page in folder.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    without_new = re.sub(r"`[^`]+`:\n\n```python", "```python", page.read_text(encoding="utf-8"))
    text = re.sub(r"^```.*?^```$", "", without_new, flags=re.DOTALL | re.MULTILINE)
    files = [str(file.relative_to(ROOT)) for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"`([\w./]+\.py)`", text):
        assert any(file == name or file.endswith(f"/{name}") for file in files), name


def anchors(page: Path) -> set[str]:
    """What links into a page may name: its headings as GitHub spells them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_name_one_that_exists(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert anchor in anchors(other), f"{target}#{anchor}"


SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("text", [*PAGES, *SCRIPTS], ids=lambda text: text.name)
def test_a_script_knows_the_options_that_it_is_said_to_have(text: Path) -> None:
    said = text.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, arguments in re.findall(r"python scripts/(\w+\.py)([^\n`#]*)", said):
        source = (ROOT / "scripts" / name).read_text(encoding="utf-8")
        shared = re.findall(r"^from (\w+) import", source, re.MULTILINE)
        near = [ROOT / "scripts" / f"{one}.py" for one in shared]
        sources = source + "".join(one.read_text(encoding="utf-8") for one in near if one.exists())
        for option in re.findall(r"(?<=\s)--[a-z][\w-]*", arguments):
            assert f'"{option}' in sources, f"{name} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    text = "\n".join([*blocks, *re.findall(r"^(?: {4}|\$ ).*$", text, re.MULTILINE)])
    for command, rest in re.findall(r"^ *(?:\$ )?(?:\w+=\S+ |[^`\n]*\| )?specexec (\w+)(.*)", text, re.MULTILINE):
        found = commands.get_command(click.Context(commands), command)
        assert found is not None, command
        if isinstance(found, click.Group):
            continue
        known = {
            name
            for one in [*found.params, *found.get_params(click.Context(found, **commands.context_settings))]
            for name in one.opts
        }
        known |= {name for one in found.params for name in one.secondary_opts}
        typed = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", rest.partition("#")[0]))
        assert typed <= known, typed - known


def test_the_picture_is_small_and_shows_what_the_screen_shows() -> None:
    picture = (ROOT / "docs" / "terminal.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    assert len(picture) < 100_000
    for said in ("tok/sweep", "s left", "guessed · depth", "guesses kept", "link limited to"):
        assert said in picture
