"""Memory of an answer beside the plan, in every format of weights on one shape: scripts/measure_memory.py for each.

    python scripts/measure_format_memory.py              # a llama of 4 layers of 8.6 M weights, streamed from disk

The model is random and small enough to be made in seconds; its layers are large beside the noise of an interpreter. It
computes in bfloat16, as published ones do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from offload.checkpoint.documents import CONFIG
from tests.weight_formats import ROWS

HOME = Path(__file__).resolve().parents[1]
SIZES = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
ASKED = ("--ctx", "128", "--budget", "32", "--tokens", "4", "--json")
MiB = 1 << 20


@click.command()
@click.option("--only", type=click.Choice([*ROWS]), multiple=True)
@click.option("--offload", default="disk", show_default=True)
def main(only: tuple[str, ...], offload: str) -> None:
    """Measure every format; 1 where one takes more than its plan."""
    over = []
    for title in only or ROWS:
        with tempfile.TemporaryDirectory() as workplace:
            path, _ = ROWS[title].make(Path(workplace) / "made", **SIZES)
            if path.is_dir():
                config = json.loads((path / CONFIG).read_text())
                (path / CONFIG).write_text(json.dumps(config | {"dtype": "bfloat16"}))
            command = [sys.executable, str(HOME / "scripts" / "measure_memory.py"), str(path), "--offload", offload]
            ran = subprocess.run(
                [*command, *ASKED], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HOME)}
            )
        if ran.returncode:
            raise click.ClickException(ran.stderr[-2000:])
        found = json.loads(ran.stdout)
        ratio = found["peak_B"] / found["plan_B"]
        over += [title] * (ratio > 1)
        sizes = " | ".join(f"{found[name] / MiB:.1f}" for name in ("weights_B", "plan_B", "peak_B"))
        click.echo(f"| {title} | {sizes} | {ratio:.2f} |")
    raise SystemExit(1 if over else 0)


if __name__ == "__main__":
    main()
