"""Tries every causal language model that transformers knows, tiny and random, and says what works with it.

    python scripts/zoo.py llama gemma4            some model types, a line each
    python scripts/zoo.py --write                 all of them, into docs/architectures.md (minutes)

Each is made from transformers' own defaults, shrunk, saved and streamed. Truth is transformers' own class: its greedy
text, and the logits of every node's path alone.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import transformers

from specexec.model.remote_code_check import TRIED
from tests.zoo import Found, tried, types

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
ROW = re.compile(r"^\| `([\w.-]+)` \| ([\w ]+) \| (.*) \|$", re.MULTILINE)
BEGIN = "<!-- made by scripts/zoo.py -->\n"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--write", is_flag=True, help="Put what was found into docs/architectures.md.")
@click.option("--part", default="1/1", help="Of all types only these, such as 2/4.")
def zoo(names: tuple[str, ...], write: bool, part: str) -> None:
    """Try the model types NAMES, or all."""
    warnings.filterwarnings("ignore")
    number, parts = map(int, part.split("/"))
    for name in names or types()[number - 1 :: parts]:
        found = tried(name)
        click.echo(f"{found.model_type:28} {found.outcome:10} {found.why}")
        if write:
            put(found)


def put(found: Found) -> None:
    """One row of the table, in its place; the numbers above it anew, and the list of what needs no trial."""
    before, _, table = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    rows = {row[1]: (row[2], row[3]) for row in ROW.finditer(table)}
    rows[found.model_type] = (found.outcome, found.why.replace("|", "/"))
    counts = Counter(outcome for outcome, _ in rows.values())
    lines = [
        f"transformers {transformers.__version__}: " + ", ".join(f"{n} {o}" for o, n in counts.most_common()) + ".\n"
    ]
    lines += ["| model type | outcome | why not more |", "|---|---|---|"]
    lines += [f"| `{name}` | {outcome} | {why} |" for name, (outcome, why) in sorted(rows.items())]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    runs = [name for name, (outcome, _) in sorted(rows.items()) if outcome in ("trees", "plain")]
    TRIED.write_text("\n".join(runs) + "\n", encoding="utf-8")


if __name__ == "__main__":
    zoo()
