"""Skipping sublayers against skipping whole layers, and when to stop drafting. No figure depends on the machine.

`sets`: of all sets that take at most a share of the target's layers (in bytes), the one that the search's own measure
likes best on the target's answers to a few questions, made of sublayers and of whole layers; tokens per sweep of both
on prompts.jsonl. And how near the search comes to the best of all sets, after how many tries, beside random draws.
`stop`: tokens per second on a charged clock (measure_budget.py) of chains that end by Draft & Verify's adaptive
threshold, of chains that end where the next node no longer pays, and of the tree that `--budget auto` grows.

    python scripts/measure_skip.py sets --share 0.4,0.6
    python scripts/measure_skip.py stop --charge 0,1,0.002,0.5,0.001
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from weakref import WeakKeyDictionary

import click
import numpy as np
from bootstrap import interval, ratio
from measure_budget import Charged
from measure_trees import prompts
from tqdm import tqdm

import offload
import specexec
from specexec import SamplingParams
from specexec.compose.drafter_makers import questions
from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Drafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import TOGETHER, Judge, Terms, own_words, searched, skipping
from specexec.engine.engine import Engine
from specexec.model.sublayers import Kept, sizes_of
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import BestFirst, Planner
from specexec.planning.budget import Budget
from specexec.text.sequence import Sequence
from specexec.tree.growing import Growth
from specexec.tree.tree import ROOT, Floats, TokenTree

SEEDS = 20


def drafter_of(llm: Engine, kept_LS: Kept) -> SiblingDrafter:
    target = llm._decoder.target
    assert isinstance(target, TreeLM)
    return skipping(target, partial(offload.resident_layer, llm._model), kept_LS, len(llm.tokenizer))


def spelled(kept_LS: Kept) -> str:
    """One letter a layer: whole, attention only, MLP only, nothing."""
    return "".join("·maw"[2 * attention + mlp] for attention, mlp in kept_LS.astype(int).tolist())


@click.group()
def main() -> None:
    """Measure what skipping sublayers brings."""


@main.command()
@click.option("--model", default="demo", show_default=True, help="Few layers: all sets are tried.")
@click.option("--share", default="0.4,0.6", show_default=True, help="Comma list of shares of the layers' bytes.")
@click.option("--temperature", default="0,0.8", show_default=True, help="Comma list.")
@click.option("--tokens", default=24, show_default=True)
@click.option("--budget", default=32, show_default=True)
@click.option("--limit", default=44, show_default=True, help="Prompts to use, spread over the list.")
def sets(model: str, share: str, temperature: str, tokens: int, budget: int, limit: int) -> None:
    """Sublayers against whole layers at equal cost."""
    asked = prompts()[:: max(1, 44 // limit)][:limit]
    with specexec.load(model, drafter="sibling", offload="none", dtype="f32", budget=budget) as llm:
        layers = [offload.skeleton_layer(llm._model, i) for i in range(offload.stream_of(llm._model).layers)]
        size_LS = sizes_of(layers)
        terms = Terms(size_LS, size_LS, _head_B(llm), 0, False, 0)
        assert isinstance(llm._target, TreeLM)
        judge = Judge(llm._target, own_words(llm._target, questions(llm.encoding)), terms)
        every = [np.array(bits, bool).reshape(-1, 2) for bits in product((False, True), repeat=2 * len(layers))]
        chance: dict[bytes, Floats] = {}
        for first in tqdm(range(0, len(every), TOGETHER), desc="sets", leave=False, disable=None):
            sets = every[first : first + TOGETHER]
            chance |= {one.tobytes(): chance_K for one, chance_K in zip(sets, judge.chances(sets), strict=True)}
        click.echo(
            "| T | share | made of | set | share taken | tokens per sweep | ratio to whole layers | texts equal |"
        )
        click.echo("|---|---|---|---|---|---|---|---|")
        for warmth in (float(part) for part in temperature.split(",")):
            samplings = [SamplingParams(temperature=warmth, seed=100 + i, max_tokens=tokens) for i in range(len(asked))]
            llm.budget = 0
            plain = [llm.generate(*pair).tokens for pair in zip(asked, samplings, strict=True)]
            llm.budget = budget
            for part in (float(part) for part in share.split(",")):
                base: np.ndarray | None = None
                for name in ("whole layers", "sublayers"):
                    terms = Terms(size_LS, size_LS, _head_B(llm), int(part * size_LS.sum() + 1), False, 0)
                    fit = [
                        one
                        for one in every
                        if terms.fits(one) and (name == "sublayers" or (one[:, 0] == one[:, 1]).all())
                    ]
                    best_LS = max(fit, key=lambda one: terms.speed(one, chance[one.tobytes()]))
                    llm._decoder.drafter = drafter_of(llm, best_LS)
                    answers = [
                        llm.generate(*pair)
                        for pair in tqdm(list(zip(asked, samplings, strict=True)), desc=name, leave=False, disable=None)
                    ]
                    rows = np.array([[len(one.tokens), one.sweeps] for one in answers])
                    base = rows if base is None else base
                    equal = sum(one.tokens == text for one, text in zip(answers, plain, strict=True))
                    taken = size_LS[best_LS].sum() / size_LS.sum()
                    click.echo(
                        f"| {warmth:g} | {part:g} | {name} | `{spelled(best_LS)}` | {taken:.2f} | {interval(rows)} "
                        f"| {ratio(rows, base)} | {equal} of {len(rows)} |"
                    )
        _searching(llm, size_LS, every, chance)


def _searching(llm: Engine, size_LS: np.ndarray, every: list[Kept], chance: dict[bytes, Floats]) -> None:
    """How much of the best set's speed a search reaches."""
    click.echo("\n| copies | tries | the search | at random, mean (lowest to highest) |\n|---|---|---|---|")
    for name, copy_LS in (("none needed", np.zeros_like(size_LS)), ("half of the layers", size_LS)):
        terms = Terms(copy_LS, size_LS, _head_B(llm), int(0.5 * size_LS.sum()), False, 0)
        speed = {one.tobytes(): terms.speed(one, chance[one.tobytes()]) for one in every if terms.fits(one)}
        best, all_speeds = max(speed.values()), np.array([*speed.values()])
        for tries in (24, 48, 96, 128, 192):
            found_LS = searched(terms, partial(_looked_up, speed), tries)
            drawn = [np.random.default_rng(seed).choice(all_speeds, tries, False).max() / best for seed in range(SEEDS)]
            click.echo(
                f"| {name} | {tries} of {len(speed)} | {speed[found_LS.tobytes()] / best:.3f} "
                f"| {np.mean(drawn):.3f} ({min(drawn):.3f}–{max(drawn):.3f}) |"
            )


def _looked_up(speed: dict[bytes, float], sets: Items[Kept]) -> list[float]:
    return [speed[one.tobytes()] for one in sets]


def _head_B(llm: Engine) -> int:
    return sum(weight.nbytes for weight in llm._model.get_output_embeddings().parameters())


@dataclass
class Threshold:
    """A chain that ends where the drafter is less sure than a threshold, after Draft & Verify's code.

    After each sweep: share accepted, averaged with 0.5; below 0.9 the threshold goes up by 0.01, else, if the chain
    ended before its time, down by as much; the new one counts 0.1.
    """

    most: int = 12
    threshold: float = 0.6
    matching: float = 1.0
    _drafted: WeakKeyDictionary[Sequence, tuple[int, int]] = field(default_factory=WeakKeyDictionary)

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        return [self._chain(drafter, sequence) for sequence in live]

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        """Nothing ahead."""

    def _chain(self, drafter: Drafter, sequence: Sequence) -> TokenTree:
        self._adapt(sequence)
        sequence.growth, node = Growth(), ROOT
        most = min(self.most, sequence.room - 1)
        for level in range(most):
            (guess,) = drafter.guess([Ask(sequence, sequence.growth.tree, [node])], 1)
            sequence.growth.add([node], guess.tokens_NK, guess.log_probs_NK, -np.inf)
            node = level
            if guess.log_probs_NK[0, 0] < np.log(self.threshold):
                break
        tree = sequence.growth.tree
        self._drafted[sequence] = (len(sequence.tokens), len(tree))
        return tree.top(len(tree))

    def _adapt(self, sequence: Sequence) -> None:
        length, drafted = self._drafted.pop(sequence, (0, 0))
        if not drafted:
            return
        accepted = min(len(sequence.tokens) - length - 1, drafted)
        self.matching = 0.5 * self.matching + 0.5 * accepted / drafted
        wanted = self.threshold
        if self.matching < 0.9:
            wanted += 0.01
        elif drafted < self.most:
            wanted -= 0.01
        self.threshold = 0.9 * self.threshold + 0.1 * wanted


@main.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--charge", default="0,1,0.002,0.5,0.001", show_default=True, metavar="STREAM,SWEEP,ROW,PASS,NODE")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--tokens", default=32, show_default=True)
@click.option("--limit", default=44, show_default=True, help="Prompts to use, spread over the list.")
def stop(model: str, charge: str, temperature: float, tokens: int, limit: int) -> None:
    """An adaptive threshold against marginal reach."""
    asked = prompts()[:: max(1, 44 // limit)][:limit]
    samplings = [SamplingParams(temperature=temperature, seed=100 + i, max_tokens=tokens) for i in range(len(asked))]
    rules: list[tuple[str, Planner, Ranking]] = [
        ("chain, adaptive threshold", Threshold(), Ranking(tau=1.0, shared_noise=False)),
        ("chain, marginal reach", BestFirst(width=1), Ranking()),
        ("tree, marginal reach", BestFirst(), Ranking()),
    ]
    click.echo(f"{len(asked)} prompts, {tokens} tokens each, T = {temperature:g}, charged {charge}\n")
    click.echo(
        "| rule | tokens per sweep | passes per sweep | tokens per charged second | plain | threshold at the end |"
    )
    click.echo("|---|---|---|---|---|---|")
    for name, planner, ranking in rules:
        clock = Charged(*(float(part) for part in charge.split(",")))
        with specexec.load(model, drafter="skip", offload="none", dtype="f32") as llm:
            drafter = llm._decoder.drafter
            assert isinstance(drafter, SiblingDrafter)
            drafter.ranking, llm._decoder.planner, llm.budget = ranking, planner, "auto"
            clock.take_over(llm)
            passes, guess = 0, drafter.guess

            def counted(asks: list[Ask], width: int, guess=guess):  # type: ignore[no-untyped-def]
                nonlocal passes
                passes += 1
                return guess(asks, width)

            drafter.guess = counted  # type: ignore[method-assign]
            answers = [
                llm.generate(*pair)
                for pair in tqdm(list(zip(asked, samplings, strict=True)), desc=name, leave=False, disable=None)
            ]
        written, sweeps = sum(len(one.tokens) for one in answers), sum(one.sweeps for one in answers)
        one_s = max(clock.stream_s, clock.sweep_s + clock.row_s)
        end = f"{planner.threshold:.2f}" if isinstance(planner, Threshold) else ""
        speed = f"{written / clock.now_s:.3f}"
        click.echo(f"| {name} | {written / sweeps:.2f} | {passes / sweeps:.2f} | {speed} | {1 / one_s:.3f} | {end} |")


if __name__ == "__main__":
    main()
