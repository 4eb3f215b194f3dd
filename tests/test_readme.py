"""The README tells the truth: its prompts are ones the demo answers, its files exist."""

import json
import re
from pathlib import Path

from click.testing import CliRunner

from cli.app import COMMANDS, commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GOLDEN = {row["prompt"] for row in json.loads((ROOT / "offload" / "demo" / "golden.json").read_text())}


def test_prompts_in_the_readme_are_golden() -> None:
    asked = re.findall(r'chat -p "([^"]+)"', README) + re.findall(r'"content": "([^"]+)"', README)
    assert len(asked) >= 3
    assert set(asked) <= GOLDEN


def test_prompts_in_the_help_are_golden() -> None:
    for command in (None, *COMMANDS):
        shown = CliRunner().invoke(commands, [*([command] if command else []), "--help"]).output
        # A piped file or an image is part of the prompt.
        alone = [line for line in shown.splitlines() if "|" not in line and " -i " not in line]
        assert set(re.findall(r'-p "([^"]+)"', "\n".join(alone))) <= GOLDEN


def test_commands_in_the_readme_exist() -> None:
    typed = re.findall(r"^\$ specexec (\w+)", README, re.M)
    assert typed
    assert set(typed) <= set(COMMANDS)


def test_files_the_readme_names_exist() -> None:
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert linked
    for file in linked:
        assert (ROOT / file).exists(), file
    for row in re.findall(r"^\| (`.+?) \|", README, re.M):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            folder = name.rpartition("/")[0] if name.rpartition("/")[0] in ("specexec", "offload") else folder
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
