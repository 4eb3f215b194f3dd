"""docs/how-a-prompt-becomes-an-answer.md tells what really happens: its names exist and its example is real."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import specexec

PAGE = Path(__file__).parent.parent / "docs" / "how-a-prompt-becomes-an-answer.md"
TEXT = PAGE.read_text(encoding="utf-8")
# `Name` in [file](../file), or `Name` ([file](../file))
NAMED = re.compile(r"`(\w+)`\s+(?:in(?:\s+the\s+same\s+file,)?\s+)?\(?\[([\w/.]+)\]\(\.\./([\w/.]+)\)")


def test_every_linked_file_exists_and_every_name_beside_it_is_defined_there() -> None:
    linked = re.findall(r"\[([\w/.]+)\]\(\.\./([\w/.]+)\)", TEXT)
    assert len(linked) > 25
    for shown, target in linked:
        assert shown == target
        assert (PAGE.parent.parent / target).exists(), target
    named = NAMED.findall(TEXT)
    assert len(named) > 25
    for name, _, target in named:
        tree = ast.parse((PAGE.parent.parent / target).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert name in defined, f"{name} in {target}"


def test_every_folder_in_a_heading_exists() -> None:
    headings = re.findall(r"^## \d+\. .*\((.+)\)$", TEXT, re.MULTILINE)
    folders = [name for heading in headings for name in re.findall(r"`([\w/]+)`", heading)]
    assert len(headings) == 8
    for folder in folders:
        assert (PAGE.parent.parent / folder).is_dir(), folder


def test_the_example_is_what_the_demo_writes() -> None:
    (prompt,) = re.findall(r'chat -p "(.+?)"', TEXT)
    (answer,) = re.findall(r"^\$ specexec chat .*\n(.+)$", TEXT, re.MULTILINE)
    (tokens,) = re.findall(r"→   ([\d ]+)$", TEXT, re.MULTILINE)
    sweeps = re.findall(r"^    sweep \d   (.+?)  .*?(\d+) tokens$", TEXT, re.MULTILINE)
    message = [{"role": "user", "content": prompt}]
    with specexec.load("demo", budget=12, dtype="f32", device="cpu") as llm:
        assert llm.encode(message) == [int(token) for token in tokens.split()]
        bursts = list(llm.stream(message))
    assert "".join(burst.text for burst in bursts) == answer
    assert [(burst.text.strip(), len(burst.tokens)) for burst in bursts] == [(text, int(n)) for text, n in sweeps]
    assert [len(burst.path) for burst in bursts[:2]] == [12, 12]
    assert re.findall(r"taken (\d+) sweeps", TEXT) == [str(sum(len(burst.tokens) for burst in bursts))]
