"""Reads, packs and drafts with a tiny model in every format of weights, and puts what works into docs/quantized.md.

    python scripts/weights_table.py              # says what it finds, a minute
    python scripts/weights_table.py --write      # into the table

Recorded weights (scripts/record_formats.py) are compared with what their packages made of them; the other truths of
the table are those of test_offload_quant.py, test_fp8.py, test_gguf.py and test_quantised_formats.py in tests.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from tests.weight_formats import ROWS, line, tried

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantized.md"
BEGIN, END = "<!-- table: formats -->\n", "<!-- end -->"
HEAD = (
    "| format | `quant_method` | tensors of a weight X | read | packed (`--quant none`) | drafted with "
    "| checked against, bit for bit |\n|---|---|---|---|---|---|---|\n"
)


@click.command()
@click.option("--write", is_flag=True, help="Put it into docs/quantized.md.")
def main(write: bool) -> None:
    """Try every format."""
    lines = []
    for title in ROWS:
        with tempfile.TemporaryDirectory() as workplace:
            lines.append(line(title, tried(title, Path(workplace))))
        click.echo(lines[-1])
    if write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}{HEAD}" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}"
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
