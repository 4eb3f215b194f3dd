"""The figures of docs/: each is made by the script, shown on a page, told in words, and legible on any background."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from offload.checkpoint.headers import open_folder
from offload.hub.names import demo_folder
from offload.packs.pack import pack, plan

ROOT = Path(__file__).parents[1]
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.svg"))
IDEAS = ["shared-noise", "calibrated-tree", "streaming", "packs", "batch"]


def shown(page: Path) -> list[tuple[str, str]]:
    """(alternative text, file) of each picture on a page."""
    return re.findall(r"!\[([^\]]*)\]\(figures/([\w.-]+)\)", page.read_text(encoding="utf-8"))


def words(figure: Path) -> list[str]:
    """Every text in a figure."""
    return ["".join(one.itertext()) for one in ElementTree.parse(figure).iter("{http://www.w3.org/2000/svg}text")]


def test_every_figure_is_shown_and_every_shown_figure_is_one_that_the_script_draws() -> None:
    pictures = [picture for page in (ROOT / "docs").glob("*.md") for picture in shown(page)]
    made = re.search(r"for one in \(([\w, ]+)\)", (ROOT / "scripts" / "doc_figures.py").read_text(encoding="utf-8"))
    assert made is not None
    drawn = {f"{name.strip()}.svg" for name in made[1].split(",")}
    assert {file for _, file in pictures} == {figure.name for figure in FIGURES} == drawn
    assert all(len(alternative) > 40 for alternative, _ in pictures), "a reader who cannot see it learns what it shows"


@pytest.mark.parametrize("idea", IDEAS)
def test_every_idea_begins_with_its_problem_and_has_a_figure_and_a_command(idea: str) -> None:
    page = ROOT / "docs" / f"{idea}.md"
    text = page.read_text(encoding="utf-8")
    problem, idea_at = text.index("**The problem.**"), text.index("**The idea.**")
    assert text.index("\n# " if text[0] != "#" else "# ") < problem < idea_at
    for _, file in shown(page):
        assert re.search(rf"`python scripts/doc_figures.py[\w ]* {file.removesuffix('.svg')}\b", text), file
    assert shown(page)
    assert "\n$ specexec " in text


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.stem)
def test_a_figure_is_small_and_lies_on_a_card_of_its_own(figure: Path) -> None:
    assert figure.stat().st_size < 100_000
    assert words(figure), "text stays text"
    paths = ElementTree.parse(figure).iter("{http://www.w3.org/2000/svg}path")
    assert "fill: #fdfdfc" in next(paths).get("style", ""), "the first thing painted is the background"


def test_the_picture_of_a_shard_says_what_its_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    importlib.import_module("doc_figures").main(["shard", "--out", str(tmp_path)], standalone_mode=False)
    pack(plan(open_folder(demo_folder("target")), "none"), tmp_path / "pack")
    raw = (tmp_path / "pack" / "layer-00000.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {name: entry for name, entry in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"}
    drawn = words(tmp_path / "shard.svg")
    assert {name.removeprefix("model.layers.0.") for name in header} <= set(drawn)
    begins = {f"{(8 + length + entry['data_offsets'][0]) // 64} × 64" for entry in header.values()}
    assert {text for text in drawn if " × " in text} == begins
    assert words(ROOT / "docs" / "figures" / "shard.svg") == drawn, "the one in docs is the one that is drawn"
