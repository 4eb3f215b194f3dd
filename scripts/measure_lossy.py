"""What --lossy changes and saves, beside the exact run (docs/lossy.md).

The target is SmolLM2-135M-Instruct in float32, or --folder. The drafter is a copy of it whose linear layers were
rounded to --bits bits in groups of 32: a weaker model that writes by itself. Steps: sums and explanations, greedy, at
several thresholds. Prompts: the beginning of --text with a question behind it; the first 64 tokens of the exact answer
are then read behind both prompts. Prints markdown tables.

    python scripts/measure_lossy.py steps --scores inf,8,6,4,0
    python scripts/measure_lossy.py prompt --lengths 4k,8k --shares 0.5,0.25
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import click
import torch
from measure_window import counts
from real_material import model as real_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import specexec
from specexec.compose.load_options import LoadOptions
from specexec.lossy import prompts
from specexec.sampling.params import SamplingParams

GROUP = 32
QUESTIONS = (
    "A pen costs 3 dollars and a book 7. Tom buys 4 pens and 2 books. How much does he pay? Think step by step.",
    "A train leaves at 9:40 and arrives at 12:15. How long does it travel? Think step by step.",
    "Explain in four short paragraphs why the sky is blue.",
    "Give me three tips for staying healthy, and a paragraph about each.",
)


@click.group()
def main() -> None:
    """Measure --lossy."""


def rounded(folder: Path, bits: int, out: Path) -> Path:
    """A copy of a checkpoint with linear layers of so many bits, stored whole."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    for file in folder.glob("*.safetensors"):
        weights = {
            name: _rounded(weight, bits) if "_proj" in name else weight for name, weight in load_file(file).items()
        }
        save_file(weights, out / file.name, {"format": "pt"})
    return out


def _rounded(weight: Tensor, bits: int) -> Tensor:
    groups = weight.float().unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return ((groups / step).round() * step).flatten(-2).to(weight.dtype)


@main.command()
@click.option("--folder", type=click.Path(path_type=Path))
@click.option("--bits", default=4, show_default=True)
@click.option("--scores", default="inf,8,6,4,0", show_default=True, help="Thresholds. Comma list.")
@click.option("--tokens", default=120, show_default=True, help="Of each answer, at most.")
def steps(folder: Path | None, bits: int, scores: str, tokens: int) -> None:
    """Sweeps, and steps that were replaced, by threshold."""
    target, sampling = folder or real_model(), SamplingParams(temperature=0.0, max_tokens=tokens)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    exact: list[tuple[int, ...]] = []
    print(
        "| least score | tokens | sweeps | tokens a sweep | steps replaced | sweeps saved | as the exact text, tokens |"
    )
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        drafter = rounded(target, bits, Path(name) / "rounded")
        for score in scores.split(","):
            lossy = LoadOptions(str(drafter), dtype="f32", offload="none", lossy=(f"steps={score}",))
            with specexec.load(str(target), lossy) as llm:
                found = [llm.generate(prompt, sampling) for prompt in asked]
            exact = exact or [one.tokens for one in found]
            same = [_common(one.tokens, other) for one, other in zip(found, exact, strict=True)]
            written, sweeps = sum(len(one.tokens) for one in found), sum(one.sweeps for one in found)
            steps = [replaced for one in found for replaced in one.replaced]
            print(
                f"| {score} | {written} | {sweeps} | {written / sweeps:.2f} | {len(steps)} | {sum(steps)} | "
                f"{sum(same)} of {sum(map(len, exact))} |",
                flush=True,
            )


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path))
@click.option("--bits", default=4, show_default=True)
@click.option("--lengths", default="4k,8k", show_default=True, help="Tokens of the prompt, about. Comma list.")
@click.option("--shares", default="0.5,0.25", show_default=True, help="Comma list.")
@click.option("--text", type=click.Path(path_type=Path), default=Path("docs/architectures.md"), show_default=True)
@click.option("--question", default="In one paragraph: what is this text about?", show_default=True)
@click.option("--tokens", default=64, show_default=True)
def prompt(folder: Path | None, bits: int, lengths: str, shares: str, text: Path, question: str, tokens: int) -> None:
    """Seconds until the first token, and how far the answer is from the exact one, by share."""
    target, words = folder or real_model(), text.read_text(encoding="utf-8")
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    print(
        "| prompt | share | read | drafter looks, s | target reads, s | KL(exact, short), nats | same likeliest token |"
    )
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        drafter = rounded(target, bits, Path(name) / "rounded")
        exactly = LoadOptions("none", dtype="f32", offload="none", ctx=max(counts(lengths)))
        for length in counts(lengths):
            with specexec.load(str(target), exactly) as llm:
                cut = llm.decode(llm.encode(words)[: length - 2 * tokens - 64])
                asked = [{"role": "user", "content": f"{cut}\n\n{question}"}]
                whole = len(llm.encode(asked))
                answer = llm.generate(asked, sampling)
                first_s = _first_s(llm, asked, sampling)
                exact = torch.cat([*llm.log_probs_along(asked, answer.tokens, sampling)])
            print(f"| {whole:,} | all | {whole:,} | 0 | {first_s:.1f} | 0 | {tokens} of {tokens} |", flush=True)
            for share in shares.split(","):
                lossy = replace(exactly, drafter=str(drafter), lossy=(f"prompt={share}",))
                with specexec.load(str(target), lossy) as llm:
                    encoded = llm.encode(asked)
                    began = time.perf_counter()
                    prompts.looked_at(llm.models["drafter"], encoded)
                    looked_s = time.perf_counter() - began
                    short = torch.cat([*llm.log_probs_along(asked, answer.tokens, sampling)])
                    kept = llm._shorten(encoded)
                with specexec.load(str(target), exactly) as llm:
                    first_s = _first_s(llm, kept, sampling)
                nats = (exact.exp() * (exact - short)).sum(-1)
                same = int((exact.argmax(-1) == short.argmax(-1)).sum())
                print(
                    f"| {whole:,} | {share} | {len(kept):,} | {looked_s:.1f} | {first_s:.1f} | "
                    f"{mean(nats.tolist()):.3f} | {same} of {tokens} |",
                    flush=True,
                )


def _first_s(llm: specexec.Engine, asked: object, sampling: SamplingParams) -> float:
    """Seconds until the first burst."""
    began = time.perf_counter()
    bursts = llm.stream(asked, sampling)  # type: ignore[arg-type]  # messages or ids
    next(bursts)
    took_s = time.perf_counter() - began
    bursts.close()  # type: ignore[attr-defined]  # a generator
    return took_s


if __name__ == "__main__":
    main()
