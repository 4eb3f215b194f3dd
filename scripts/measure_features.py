"""Does more than tau pay? Logs what a drafter's guesses looked like and whether the target agreed, and compares models.

For the first candidates of every verified node: logit of the probability at the learned tau, rank, depth, entropy of
the candidates, lead of the first over the second, and whether the same text's past names the token too (agreement).
One logistic model on that logit alone and one on all features (as the acceptance head of SpecDec++, Huang et al. 2024,
but on these instead of hidden states) are fitted on the first prompts. On the others, which nothing was fitted on:
log-loss and calibration error of "the target chooses this child", nodes weighted by reach; and tokens per sweep if the
tree is grown by each, with a 95 % bootstrap interval of the ratio. Needs scikit-learn.

    python scripts/measure_features.py --train 22 --budget 64 --tokens 40 --temperature 0,0.8
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import click
import numpy as np
from bootstrap import ratio
from measure_trees import prompts
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]  # it brings no types
from torch import Tensor

import specexec
from specexec import SamplingParams
from specexec.drafters.calibration import log_softmax
from specexec.drafters.protocol import Ask, Guesses
from specexec.drafters.read_rows import AskedBatch
from specexec.drafters.retrieval.suffix_index import Recent, context_of
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.engine import Engine
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree

TOP = 8  # candidates of a node that are looked at
NAMES = ("logit p at tau", "rank", "depth", "entropy", "lead", "agreement")


@dataclass
class Log:
    """Of all prompts: features [n, 6] of candidates, whether the target chose them, and the nodes' weights."""

    features: list[Floats] = field(default_factory=list)
    chosen: list[Floats] = field(default_factory=list)
    weights: list[Floats] = field(default_factory=list)

    def arrays(self) -> tuple[Floats, Floats, Floats]:
        return np.concatenate(self.features), np.concatenate(self.chosen), np.concatenate(self.weights)


@dataclass(frozen=True)
class Fitted:
    """A logistic model of some of the features."""

    model: LogisticRegression
    columns: list[int]
    scale_F: Floats

    @staticmethod
    def on(columns: list[int], x: Floats, y: Floats, w: Floats) -> Fitted:
        scale_F = x[:, columns].std(0) + 1e-9
        return Fitted(
            LogisticRegression(max_iter=500).fit(x[:, columns] / scale_F, y, sample_weight=w), columns, scale_F
        )

    def chances(self, x: Floats) -> Floats:
        return np.asarray(self.model.predict_proba(x[:, self.columns] / self.scale_F)[:, 1])

    @property
    def largest(self) -> str:
        weights = sorted(zip(self.model.coef_[0], self.columns, strict=True), key=lambda one: -abs(one[0]))
        return ", ".join(f"{NAMES[column]} {weight:+.2f}" for weight, column in weights[:4])


class Featured(SiblingDrafter):
    """A sibling that writes down features of what it says, and says what `fitted` makes of them if there is one."""

    def __init__(self, llm: Engine, log: Log, fitted: Fitted | None = None) -> None:
        super().__init__(llm._drafts["drafter"], len(llm.tokenizer))
        self.log, self.fitted = log, fitted
        self._features: dict[int, tuple[Ints, Floats]] = {}  # of the nodes of the running sweep
        self._past: WeakKeyDictionary[Sequence, tuple[Recent, list[int]]] = WeakKeyDictionary()

    def _best(self, ask: Ask, hidden_NH: Tensor, width: int) -> Guesses:
        guesses = super()._best(ask, hidden_NH, width)
        asked = self._below[ask.sequence].asked[-1]
        x_NKF = self._features_of(ask, asked)
        self._features |= {n: (t, f) for n, t, f in zip(ask.nodes, asked.tokens_NC[:, :TOP], x_NKF, strict=True)}
        if self.fitted is not None:
            count = min(TOP, guesses.log_probs_NK.shape[1])
            flat = self.fitted.chances(x_NKF[:, :count].reshape(-1, len(NAMES)))
            guesses.log_probs_NK[:, :count] = np.where(
                np.isfinite(guesses.log_probs_NK[:, :count]), np.log(flat).reshape(len(ask.nodes), count), -np.inf
            )
        return guesses

    def _features_of(self, ask: Ask, asked: AskedBatch) -> Floats:
        scores_NC = np.maximum(asked.scores_NC, -1e4)
        log_probs_NC = log_softmax(scores_NC / self.calibration(ask.sequence.sampling).tau)
        x_NKF = np.zeros((len(ask.nodes), TOP, len(NAMES)))
        log_p_NK = np.clip(log_probs_NC[:, :TOP], -20.0, -1e-6)
        x_NKF[:, :, 0] = log_p_NK - np.log(-np.expm1(log_p_NK))
        x_NKF[:, :, 1] = np.log1p(np.arange(TOP))
        x_NKF[:, :, 2] = np.array([0 if n == ROOT else ask.tree.depth_N[n] + 1 for n in ask.nodes])[:, None]
        x_NKF[:, :, 3] = -(np.exp(log_probs_NC) * log_probs_NC).sum(1)[:, None]
        x_NKF[:, :, 4] = np.minimum(log_probs_NC[:, 0] - log_probs_NC[:, 1], 30)[:, None]
        past, length = self._past.setdefault(ask.sequence, (Recent(), [1]))
        past.extend(ask.sequence.tokens, start=length[0])
        length[0] = len(ask.sequence.tokens)
        paths = [[] if node == ROOT else ask.tree.spelled(node) for node in ask.nodes]
        for row, path in enumerate(paths):
            found = past.matches(context_of([*ask.sequence.tokens, *path]))
            named = {token for match in found if match.rung for token, _ in match.followers}
            x_NKF[row, :, 5] = [int(token) in named for token in asked.tokens_NC[row, :TOP]]
        return x_NKF

    def _learn(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], batches: list[AskedBatch]) -> None:
        super()._learn(sequence, tree, choices_M, batches)
        chance = np.exp(np.minimum(tree.reach_N, 0.0)).tolist()
        for name, choice, weight in zip([ROOT, *tree.ids_N.tolist()], choices_M, [1.0, *chance], strict=True):
            if name in self._features:
                tokens_K, x_KF = self._features[name]
                self.log.features.append(x_KF)
                self.log.chosen.append((tokens_K == choice).astype(float))
                self.log.weights.append(np.full(len(x_KF), weight))
        self._features = {}  # nodes that live on look like new ones: they are left out


def expected_error(chance_N: Floats, true_N: Floats, weight_N: Floats, bins: int = 10) -> float:
    """Weighted mean distance of predicted and observed frequency."""
    which_N = np.minimum((chance_N * bins).astype(int), bins - 1)
    gap = [abs((weight_N * (chance_N - true_N))[which_N == bin_].sum()) for bin_ in range(bins)]
    return float(sum(gap) / weight_N.sum())


def log_loss(chance_N: Floats, true_N: Floats, weight_N: Floats) -> float:
    """Weighted mean of -log of what was said about what came."""
    chance_N = np.clip(chance_N, 1e-6, 1 - 1e-6)
    loss_N = -np.where(true_N > 0, np.log(chance_N), np.log1p(-chance_N))
    return float((weight_N * loss_N).sum() / weight_N.sum())


@click.command()
@click.option("--drafter", default="sibling", show_default=True)
@click.option("--train", default=22, show_default=True, help="Prompts to fit on; the others judge.")
@click.option("--limit", default=44, show_default=True, help="Prompts in all.")
@click.option("--budget", default=64, show_default=True)
@click.option("--tokens", default=40, show_default=True, help="New tokens for each prompt.")
@click.option("--temperature", default="0,0.8", show_default=True, help="Comma list.")
def main(drafter: str, train: int, limit: int, budget: int, tokens: int, temperature: str) -> None:
    """Compare tau alone with tau and features, on prompts that neither was fitted on."""
    click.echo(
        "| T | P(chosen) | log-loss | calibration error | tokens per sweep | ratio to tau | largest coefficients |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    with specexec.load(drafter=drafter, offload="none", dtype="f32", budget=budget) as llm:
        for warmth in (float(part) for part in temperature.split(",")):
            samplings = [SamplingParams(temperature=warmth, seed=100 + i, max_tokens=tokens) for i in range(limit)]
            asked = list(zip(prompts()[:limit], samplings, strict=True))
            seen, unseen = Log(), Log()
            write(llm, Featured(llm, seen), asked[:train])
            x, y, w = seen.arrays()
            fits = {
                "logistic, logit p": Fitted.on([0], x, y, w),
                "logistic, all": Fitted.on(list(range(len(NAMES))), x, y, w),
            }
            base = write(llm, Featured(llm, unseen), asked[train:])
            x, y, w = unseen.arrays()
            show(warmth, "softmax(s / tau)", 1 / (1 + np.exp(-x[:, 0])), (y, w), base, base, "")
            for name, fitted in fits.items():
                rows = write(llm, Featured(llm, Log(), fitted), asked[train:])
                show(warmth, name, fitted.chances(x), (y, w), rows, base, fitted.largest)


def write(llm: Engine, drafter: Featured, asked: Items[tuple[object, SamplingParams]]) -> np.ndarray:
    """Tokens and sweeps of each prompt, [prompts, 2]."""
    llm._decoder.drafter = drafter
    answers = [llm.generate(prompt, sampling) for prompt, sampling in asked]  # type: ignore[arg-type]  # what prompts() gives
    return np.array([[len(one.tokens), one.sweeps] for one in answers])


def show(
    warmth: float,
    name: str,
    chance_N: Floats,
    true: tuple[Floats, Floats],
    rows: np.ndarray,
    base: np.ndarray,
    coefficients: str,
) -> None:
    """One row of the table."""
    loss, error = (judge(chance_N, *true) for judge in (log_loss, expected_error))
    speed = rows[:, 0].sum() / rows[:, 1].sum()
    cells = (f"{warmth:g}", name, f"{loss:.4f}", f"{error:.4f}", f"{speed:.2f}", ratio(rows, base), coefficients)
    click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
