"""Write the table of docs/formats.md: what is read of each real chat template's thoughts, calls and begun answers.

python scripts/formats_table.py          # write them
python scripts/formats_table.py --check  # fail if they are not what this would write
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from specexec.errors import BadMessages
from specexec.text.formats import Format, format_of
from specexec.text.formats.probe import ANSWER, QUESTION, tools
from specexec.text.template_options import Wishes
from tests import real
from tests.families import family

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
BEGIN, END = "<!-- table: scripts/formats_table.py -->\n", "<!-- end -->\n"


def row(template: str, form: Format) -> str:
    """One line of the table."""
    return f"| {template} | {_thoughts(form)} | {_calls(form)} | {_continue(template, form)} | {_switch(form)} |\n"


def _thoughts(form: Format) -> str:
    marks = " … ".join(mark.strip() for mark in form.thinks if mark).replace("|", r"\|")
    return f"`{marks}`" if marks else "channel" if form.thoughts else "–"


def _calls(form: Format) -> str:
    if form.refusal is None:
        return f"{form.name}{'' if form.parallel else ', one at a time'}"
    return "refused: " + form.refusal.removeprefix("the model's chat template ").partition(" (")[0]


def _continue(template: str, form: Format) -> str:
    """As what the rest of a begun answer is read."""
    encoding = family(template)
    begun: list[dict[str, object]] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    for offered in (tools(), ()):
        with suppress(BadMessages):
            prompt = encoding.encode(begun, Wishes(tools=offered, ends_in="message"))
            rest = form.reader(prompt).read(encoding.encode_rest(f" {ANSWER}"), last=True)
            parts = {"answer": rest.content, "thought": rest.reasoning}
            return ", ".join(name for name, text in parts.items() if ANSWER in text)
    return "–"


def _switch(form: Format) -> str:
    names = {f"`{name}`" for level in ("off", "on", "high") for name in form.thinking(level).variables}
    return ", ".join(sorted(names)) or "–"


def table() -> str:
    """All rows with their heading."""
    head = "| template | thoughts | calls | continue | variables of `--think` |\n|---|---|---|---|---|\n"
    return head + "".join(row(template, format_of(family(template))) for template in real.templates())


def main(arguments: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    written = f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"
    if "--check" in arguments:
        sys.exit(0 if written == page else "docs/formats.md is out of date: python scripts/formats_table.py")
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
