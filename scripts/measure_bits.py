"""Tokens per sweep of `--drafter substitute` with copies in other numbers of bits than the four that it has.

By hqq's quantiser (`pip install hqq`), in groups of 64 weights with a scale and a zero for each, multiplied as dense
weights. Prints each against NF4, with 95 % intervals from a bootstrap over prompts. Seconds are not measured.

    python scripts/measure_bits.py --every 3
"""

from __future__ import annotations

import click
import numpy as np
import torch
from bootstrap import ratio
from measure_trees import prompts
from torch import Tensor, nn

import specexec
from specexec import SamplingParams
from specexec.drafters import substitute
from specexec.drafters.substitute import BLOCK

try:
    from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]  # not among our requirements
except ImportError as missing:
    raise SystemExit(f"{missing}: pip install hqq") from missing


def copies(bits: int) -> type[nn.Module]:
    """Linears whose weights went through so many bits."""

    class FewBits(nn.Module):
        def __init__(self, linear: nn.Linear, device: torch.device) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            dense_OI = linear.weight.detach()
            codes, meta = Quantizer.quantize(
                dense_OI.float(), nbits=bits, group_size=BLOCK, axis=1, device=str(device), compute_dtype=torch.float32
            )
            self.weight = Quantizer.dequantize(codes, meta).reshape(dense_OI.shape).to(dense_OI.dtype)
            self.bias = linear.bias

        def forward(self, rows_RI: Tensor) -> Tensor:
            return nn.functional.linear(rows_RI, self.weight, self.bias)

    return FewBits


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--budget", default=32, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="New tokens for each prompt.")
@click.option("--temperature", default="0,0.8", show_default=True, help="Comma list.")
@click.option("--every", default=1, show_default=True, help="Take only each n-th prompt.")
def main(model: str, budget: int, tokens: int, temperature: str, every: int) -> None:
    """Measure how many tokens one sweep confirms, for each number of bits."""
    asked, four = prompts()[::every], substitute.FourBit
    click.echo("| bits | T | tokens/sweep | against NF4 |\n|---|---|---|---|")
    for heat in map(float, temperature.split(",")):
        found: dict[str, np.ndarray] = {}
        for name, kind in {"NF4": four, **{f"{bits}": copies(bits) for bits in (4, 3, 2)}}.items():
            substitute.FourBit = kind  # type: ignore[misc, assignment]  # what `quantised` puts in the place of a linear
            with specexec.load(model, drafter="substitute", budget=budget, offload="disk", dtype="bf16") as llm:
                answers = [
                    llm.generate(prompt, SamplingParams(temperature=heat, seed=seed, max_tokens=tokens))
                    for seed, prompt in enumerate(asked)
                ]
            rows = found[name] = np.array([(len(answer.tokens), answer.sweeps) for answer in answers], float)
            click.echo(
                f"| {name} | {heat:g} | {rows[:, 0].sum() / rows[:, 1].sum():.2f} | {ratio(rows, found['NF4'])} |"
            )


if __name__ == "__main__":
    main()
