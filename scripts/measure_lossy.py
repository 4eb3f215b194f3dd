"""What --lossy changes and saves, beside the exact run (docs/lossy.md).

The target is SmolLM2-135M-Instruct in float32, or --folder. The drafter is a copy of it whose linear layers were
rounded to --bits bits in groups of 32: a weaker model that writes by itself. Steps: sums and explanations, greedy, at
several thresholds. Prompts: the beginning of --text with a question behind it; the first 64 tokens of the exact answer
are then read behind both prompts. Keys and values: the same, without guesses. Prints markdown tables.

    python scripts/measure_lossy.py steps --scores inf,8,6,4,0
    python scripts/measure_lossy.py prompt --lengths 4k,8k --shares 0.5,0.25
    python scripts/measure_lossy.py kv --lengths 4k,8k --shares 0.5,0.25
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Literal

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
from specexec.text.messages import Prompt

GROUP = 32
TEXT = Path("docs/architectures.md")
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


def long_prompts(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that read long prompts."""
    for option in (
        click.option("--tokens", default=64, show_default=True),
        click.option("--question", default="In one paragraph: what is this text about?", show_default=True),
        click.option("--text", type=click.Path(path_type=Path), default=TEXT, show_default=True),
        click.option("--shares", default="0.5,0.25", show_default=True, help="Comma list."),
        click.option("--lengths", default="4k,8k", show_default=True, help="Tokens of the prompt, about. Comma list."),
        click.option("--bits", default=4, show_default=True),
        click.option("--folder", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Written:
    """An answer, token by token: seconds of drafting before the first sweep, of that sweep, and of a token after it."""

    tokens: tuple[int, ...]
    looked_s: float
    prompt_s: float
    token_s: float
    kv_dropped: int

    @classmethod
    def of(cls, llm: specexec.Engine, asked: Prompt, sampling: SamplingParams) -> Written:
        bursts, at_s = [], []
        for burst in llm.stream(asked, sampling):
            bursts.append(burst)
            at_s.append(time.perf_counter())
        tokens = tuple(token for burst in bursts for token in burst.tokens)
        token_s = (at_s[-1] - at_s[0]) / max(len(tokens) - len(bursts[0].tokens), 1)
        return cls(tokens, bursts[0].draft_s, bursts[0].sweep_s, token_s, bursts[-1].kv_dropped)


@dataclass(frozen=True)
class Exact:
    """A prompt about a text, the exact answer to it, and what the target found of every token of that: [R, V]."""

    asked: list[dict[str, str]]
    prompt: int
    written: Written
    log_probs_RV: Tensor

    @classmethod
    def of(cls, llm: specexec.Engine, words: str, question: str, length: int, sampling: SamplingParams) -> Exact:
        cut = llm.decode(llm.encode(words)[: length - 2 * sampling.max_tokens - 64])
        asked = [{"role": "user", "content": f"{cut}\n\n{question}"}]
        written = Written.of(llm, asked, sampling)
        log_probs_RV = torch.cat([*llm.log_probs_along(asked, written.tokens, sampling)])
        return cls(asked, len(llm.encode(asked)), written, log_probs_RV)

    def beside(self, llm: specexec.Engine, sampling: SamplingParams) -> str:
        """What a lossy engine finds of the same tokens: KL in nats, mean of all, and how many likeliest ones agree."""
        log_probs_RV = torch.cat([*llm.log_probs_along(self.asked, self.written.tokens, sampling)])
        nats_R = (self.log_probs_RV.exp() * (self.log_probs_RV - log_probs_RV)).sum(-1)
        same = int((self.log_probs_RV.argmax(-1) == log_probs_RV.argmax(-1)).sum())
        return f"{mean(nats_R.tolist()):.3f} | {same} of {len(self.written.tokens)}"


@main.command()
@long_prompts
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
                exact = Exact.of(llm, words, question, length, sampling)
            whole = exact.prompt
            prompt_s = exact.written.prompt_s
            print(f"| {whole:,} | all | {whole:,} | 0 | {prompt_s:.1f} | 0 | {tokens} of {tokens} |", flush=True)
            for share in shares.split(","):
                lossy = replace(exactly, drafter=str(drafter), lossy=(f"prompt={share}",))
                with specexec.load(str(target), lossy) as llm:
                    encoded = llm.encode(exact.asked)
                    began = time.perf_counter()
                    prompts.looked_at(llm.models["drafter"], encoded)
                    looked_s = time.perf_counter() - began
                    found = exact.beside(llm, sampling)
                    kept = llm._shorten(encoded)
                with specexec.load(str(target), exactly) as llm:
                    prompt_s = Written.of(llm, kept, replace(sampling, max_tokens=1)).prompt_s
                print(
                    f"| {whole:,} | {share} | {len(kept):,} | {looked_s:.1f} | {prompt_s:.1f} | {found} |", flush=True
                )


@main.command()
@long_prompts
@click.option("--home", type=click.Choice(["ram", "disk"]), default="ram", show_default=True, help="What --kv says.")
def kv(
    folder: Path | None,
    bits: int,
    lengths: str,
    shares: str,
    text: Path,
    question: str,
    tokens: int,
    home: Literal["ram", "disk"],
) -> None:
    """Seconds of the prompt and of a written token, and how far the answer is from the exact one, by share."""
    target, words = folder or real_model(), text.read_text(encoding="utf-8")
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    print(
        "| prompt | share | kept | drafter looks, s | prompt, s | a written token, ms | KL(exact, thinned), nats | "
        "same likeliest token |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        drafter = rounded(target, bits, Path(name) / "rounded")
        exactly = LoadOptions("none", budget=0, dtype="f32", offload="none", ctx=max(counts(lengths)), kv=home)
        for length in counts(lengths):
            with specexec.load(str(target), exactly) as llm:
                exact = Exact.of(llm, words, question, length, sampling)
            print(_row(exact.prompt, "all", exact.written, f"0 | {tokens} of {tokens}"), flush=True)
            for share in shares.split(","):
                lossy = replace(exactly, drafter=str(drafter), lossy=(f"kv={share}",))
                with specexec.load(str(target), lossy) as llm:
                    written, found = Written.of(llm, exact.asked, sampling), exact.beside(llm, sampling)
                print(_row(exact.prompt, share, written, found), flush=True)


def _row(prompt: int, share: str, written: Written, found: str) -> str:
    """Of the table of keys and values."""
    return (
        f"| {prompt:,} | {share} | {prompt - written.kv_dropped:,} | {written.looked_s:.1f} | {written.prompt_s:.1f} | "
        f"{written.token_s * 1e3:.0f} | {found} |"
    )


if __name__ == "__main__":
    main()
