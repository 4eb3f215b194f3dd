"""How fast blocks of GGUF's types become values on one thread: by the compiled loop, and by torch.

    python scripts/measure_blocks.py [TYPES ...]

Millions of values a second of CPU time, the best of nine turns, from pieces of half a MiB as a sweep takes them; random
codes, scales near 1. The loop is compiled before the clock starts; how long that takes is said at the end.
"""

from __future__ import annotations

import time
from unittest.mock import patch

import click
import torch
from timing import best_s

from offload.checkpoint.gguf.ggml_types import BY_NAME
from offload.checkpoint.quantized.arithmetic import ggml_blocks
from offload.checkpoint.quantized.arithmetic.compiled import compiled
from offload.checkpoint.quantized.arithmetic.ggml_blocks import LAYOUTS, fill_rows

COLUMNS = 2048
TURNS = 9


def speeds(name: str) -> list[float]:
    """Values a second, in millions: compiled, by torch."""
    kind, rows = BY_NAME[name], 512
    codes = torch.randint(0, 60, (rows, COLUMNS // kind.items * kind.nbytes), dtype=torch.uint8)
    target = torch.empty(rows, COLUMNS, dtype=torch.bfloat16)
    found = []
    for way in (compiled, lambda _: None):
        with patch.object(ggml_blocks, "compiled", way):
            fill_rows(name, codes, target)
            found.append(target.numel() / best_s(lambda: fill_rows(name, codes, target), TURNS, time.thread_time) / 1e6)
    return found


@click.command()
@click.argument("types", nargs=-1)
def main(types: tuple[str, ...]) -> None:
    """Measure TYPES, or all."""
    torch.set_num_threads(1)
    began = time.thread_time()
    fill_rows("Q4_0", torch.zeros(1, 18, dtype=torch.uint8), torch.empty(1, 32))
    compiling_s = time.thread_time() - began
    click.echo("| type | compiled | by torch | ratio |\n|---|---|---|---|")
    for name in types or LAYOUTS:
        compiled, by_torch = speeds(name)
        click.echo(f"| {name} | {compiled:,.0f} | {by_torch:,.0f} | {compiled / by_torch:.1f} |")
    click.echo(f"\ncompiling: {compiling_s:.1f} s, once in a process")


if __name__ == "__main__":
    main()
