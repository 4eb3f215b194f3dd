"""Tries images with every family that takes them, tiny and random, and says so in docs/architectures.md.

    python scripts/images.py smolvlm llama4       some model types, a line each
    python scripts/images.py --write              all of them, into the table (minutes)
    python scripts/images.py --published          with tokenizers and templates of published models (a minute)

Truth is transformers' own processor and generate of the whole model. Each family has to keep every promise that
tests/test_images.py makes of one; there CI tries a sample.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import transformers

from specexec.sizes import SEEING
from specexec.text.image_processor import needs_torchvision
from specexec.text.image_prompts import UNREAD
from tests import test_images as images
from tests import test_images_real as images_real
from tests.real_pictured import PUBLISHED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- made by scripts/images.py -->\n", "<!-- end -->\n"
ROW = re.compile(r"^\| `([\w.-]+)` \| ([\w ]+) \| (.*) \|$", re.MULTILINE)
PROMISES = (
    images.test_answers_about_images_are_those_of_the_whole_model,
    images.test_another_image_of_the_same_size_shares_nothing_and_the_same_one_all,
    images.test_a_conversation_goes_on_after_an_image,
    images.test_rows_of_an_image_stay_together_where_a_prompt_goes_in_pieces,
    images.test_prompts_are_spelled_as_the_processor_of_the_family_spells_them,
    images.test_a_tower_in_16_bits_sees_what_it_sees_in_32,
)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--write", is_flag=True, help="Put what was found into docs/architectures.md.")
@click.option("--published", is_flag=True, help="Try tokenizers and templates of published models, where there are.")
def main(names: tuple[str, ...], write: bool, published: bool) -> None:
    """Try the model types NAMES, or all."""
    warnings.filterwarnings("ignore")
    for name in names or (PUBLISHED if published else SEEING):
        found = tried_as_published(name) if published else tried(name)
        click.echo(f"{name:28} {found or 'read'}")
        if write:
            put(name, found)


def tried(model_type: str) -> str:
    """The first promise that is not kept; empty if all are, streamed from the disk and resident, and in 16 bits."""
    for tier in ("disk", "none"):
        with tempfile.TemporaryDirectory() as folder, images.model_of(model_type, Path(folder), tier) as model:
            for promise in PROMISES if tier == "disk" else PROMISES[:1]:
                try:
                    promise(model)
                except Exception as problem:
                    first = str(problem).strip().partition("\n")[0]
                    return f"{tier}: {promise.__name__}: {type(problem).__name__}: {first}"
    return ""


def tried_as_published(model_type: str) -> str:
    """Whether prompts and answers differ from those of the whole model; empty if they do not."""
    with tempfile.TemporaryDirectory() as folder, images_real.model_of(model_type, Path(folder)) as model:
        try:
            images_real.test_prompts_and_answers_are_those_of_the_whole_model(model)
        except Exception as problem:
            return f"{type(problem).__name__}: {str(problem).strip()}"
    return ""


def put(model_type: str, problem: str) -> None:
    """One row of the table, in its place, and rows of what is refused."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {row[1]: (row[2], row[3]) for row in ROW.finditer(table) if row[1] not in UNREAD}
    with_what = "with torchvision" if needs_torchvision(model_type) else ""
    rows[model_type] = ("wrong", problem) if problem else ("read", with_what)
    rows |= {name: ("refused", why) for name, why in UNREAD.items()}
    read = sum(outcome == "read" for outcome, _ in rows.values())
    lines = [f"transformers {transformers.__version__}: images of {read} model types are read.\n"]
    lines += ["| model type | images | |", "|---|---|---|"]
    lines += [f"| `{name}` | {outcome} | {why} |" for name, (outcome, why) in sorted(rows.items())]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
