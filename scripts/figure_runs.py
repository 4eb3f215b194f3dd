"""The runs behind the figures of docs/: the demo pair writes, streams, is packed and shares sweeps. Draws nothing.

P positions   V vocabulary   N nodes
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import torch
from measure_batch import Costs, Row, run
from measure_budget import Charged
from measure_trees import RULES, prompts, use
from torch import Tensor

import offload as weights
import specexec
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import open_folder, read_header
from offload.checkpoint.quantized.quantize import Quant
from offload.packs.pack import pack, plan
from offload.stream.stream import LayerStream
from specexec import Completion, SamplingParams
from specexec.drafters.calibration import Calibration
from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine import decoder
from specexec.engine.engine import Engine
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning import best_first as planner
from specexec.sampling.noise import Noise
from specexec.stats import Burst
from specexec.text.messages import Prompt
from specexec.tree.tree import Floats

DEMO = Path(__file__).parents[1] / "offload" / "demo"
# Seconds: streaming; a sweep and each of its rows; a drafter pass and each of its nodes (measure_budget.py).
STREAMED = (1.0, 0.02, 0.002, 0.006, 0.0001)


def demo(drafter: str = "sibling", offload: weights.Offload = "none", limit_Bps: float | None = None) -> Engine:
    """The built-in pair in float32, where no near-tie flips."""
    return specexec.load("demo", drafter=drafter, offload=offload, dtype="f32", link_limit_Bps=limit_Bps)


@dataclass(frozen=True)
class Judged:
    """A written text, and what both models and the dice say at each of its places."""

    tokens_P: Tensor
    target_PV: Tensor
    draft_PV: Tensor
    noise_PV: Tensor


def judge(llm: Engine, prompt: Prompt, sampling: SamplingParams, answer: tuple[int, ...]) -> Judged:
    """Log-probabilities of both models along the answer, and the noise of its seed."""
    read = llm.encode(prompt)
    text = [*read, *answer]
    assert isinstance(llm._target, TreeLM)
    target_PV, draft_PV = (_log_probs(lm, text)[len(read) - 1 : -1] for lm in (llm._target, llm._drafts["drafter"]))
    noise = Noise(sampling.seed or 0, target_PV.shape[1])
    return Judged(torch.tensor(answer), target_PV, draft_PV, noise.rows(range(len(read), len(text))))


def _log_probs(lm: TreeLM, text: list[int]) -> Tensor:
    (hidden_PH,) = lm.forward([Rows(KVCache(), text, range(-1, len(text) - 1))])
    return lm.head(hidden_PH).log_softmax(-1)


@dataclass(frozen=True)
class Choice:
    """A place where chance overrules the likeliest token. Rows: target and drafter with its dice; drafter with others.

    `log_probs` and `scores` (log p + G) are [3, tokens]; `tokens` hold every winner.
    """

    tokens: list[str]
    log_probs: Tensor
    scores: Tensor


def decisive_place() -> Choice:
    """The first place where the same dice lead both models to the same unlikely token, and other dice elsewhere."""
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=32)
    with demo() as llm:
        for prompt in prompts()[::-1]:  # plain texts come last, and leave most to chance
            text = judge(llm, prompt, sampling, llm.generate(prompt, sampling).tokens)
            other_PV = text.noise_PV.roll(1, 0)  # the dice of the place before are as good as any others
            other_P = (text.draft_PV + other_PV).argmax(1)
            same_P = (text.draft_PV + text.noise_PV).argmax(1) == text.tokens_P
            decisive_P = same_P & (text.tokens_P != other_P)
            decisive_P &= (text.tokens_P != text.target_PV.argmax(1)) & (text.tokens_P != text.draft_PV.argmax(1))
            decisive_P &= text.draft_PV.gather(1, other_P[:, None])[:, 0] > -4  # nor a freak of chance
            for at in decisive_P.nonzero()[:, 0].tolist():
                chosen = {int(text.tokens_P[at]), int(other_P[at])}
                if all(llm.decode([token]).strip().isalpha() for token in chosen):
                    return _choice(llm, text, other_PV, at, chosen)
    raise SystemExit("no text of the list has such a place")


def _choice(llm: Engine, text: Judged, other_PV: Tensor, at: int, chosen: set[int]) -> Choice:
    """The chosen tokens and the likeliest ones, least likely first."""
    likely = (text.target_PV[at].exp() + text.draft_PV[at].exp()).topk(6).indices.tolist()
    tokens = sorted({*chosen, *likely}, key=lambda token: float(text.target_PV[at, token]))
    log_probs = torch.stack([text.target_PV[at], text.draft_PV[at], text.draft_PV[at]])
    dice = torch.stack([text.noise_PV[at], text.noise_PV[at], other_PV[at]])
    return Choice([llm.decode([token]) for token in tokens], log_probs[:, tokens], (log_probs + dice)[:, tokens])


@dataclass(frozen=True)
class Warmth:
    """Both rules at one temperature: share of places whose first guess is the target's choice, and the answers."""

    temperature: float
    agreed: dict[str, float]
    answers: dict[str, list[Completion]]


def by_temperature(temperatures: tuple[float, ...]) -> Iterator[Warmth]:
    """Every other prompt of the list, 32 tokens each, 32 guesses a sweep, with and without shared noise."""
    asked = prompts()[::2]
    with demo() as llm:
        llm.budget = 32
        for temperature in temperatures:
            sampling = [SamplingParams(temperature=temperature, seed=seed, max_tokens=32) for seed in range(len(asked))]
            pairs = list(zip(asked, sampling, strict=True))
            found = Warmth(temperature, {}, {})
            for name, weight in (("shared noise", temperature), ("no shared noise", 0.0)):
                use(llm, RULES[name])
                found.answers[name] = [llm.generate(*pair) for pair in pairs]
                texts = [judge(llm, *pair, one.tokens) for pair, one in zip(pairs, found.answers[name], strict=True)]
                hits = [(text.draft_PV + weight * text.noise_PV).argmax(1) == text.tokens_P for text in texts]
                found.agreed[name] = float(torch.cat(hits).float().mean())
            yield found


def calibrated(drafter: str) -> Calibration:
    """What 22 answers at T = 0.8 teach about a drafter."""
    with demo(drafter) as llm:
        llm.budget = 32
        for seed, prompt in enumerate(prompts()[::2]):
            llm.generate(prompt, SamplingParams(temperature=0.8, seed=seed, max_tokens=32))
        assert isinstance(llm._decoder.drafter, SiblingDrafter)
        (learned,) = llm._decoder.drafter.calibrations.values()
        return learned


def bursts(prompt: str, nodes: int, sampling: SamplingParams) -> tuple[list[Burst], dict[int, str]]:
    """Every sweep of one answer, and the words of the tokens in it."""
    with demo() as llm:
        llm.budget = nodes
        done = list(llm.stream(prompt, sampling))
        tokens = {token for burst in done for token in (*burst.tree.tokens, *burst.tokens)}
        return done, {token: llm.decode([token]) for token in tokens}


@dataclass
class Timeline:
    """When what happened: (start, stop, layer, buffer) of reads, (start, stop, layer) of layers that compute, ….

    Seconds of one clock. `sweeps` bring their bursts along.
    """

    reads: list[tuple[float, float, int, int]] = field(default_factory=list)
    computes: list[tuple[float, float, int]] = field(default_factory=list)
    drafts: list[tuple[float, float]] = field(default_factory=list)
    sweeps: list[tuple[float, float, Burst]] = field(default_factory=list)

    def watch(self, stream: LayerStream, drafter: Drafter) -> None:
        """Write down when the stream fills a buffer, lends a layer and gets it back, and when the drafter guesses."""
        fill, take, give, guess = stream._fill, stream.take, stream.give, drafter.guess

        def filled(slot, layer, part):  # type: ignore[no-untyped-def]  # as the stream's own
            began = time.perf_counter()
            host = fill(slot, layer, part)
            if self.reads:  # it was asked for while the one before arrived, and the link carries one at a time
                began = max(began, self.reads[-1][1])
            self.reads.append((began, time.perf_counter(), layer, slot.number))
            return host

        def taken(layer: int, rows: int | None = None) -> Mapping[str, Tensor]:
            tensors = take(layer, rows)
            self.computes.append((time.perf_counter(), 0.0, layer))
            return tensors

        def given() -> None:
            began, _, layer = self.computes[-1]
            self.computes[-1] = (began, time.perf_counter(), layer)
            give()

        def guessed(asks: list[Ask], width: int) -> list[Guesses]:
            began = time.perf_counter()
            guesses = guess(asks, width)
            self.drafts.append((began, time.perf_counter()))
            return guesses

        for name, watched in (("_fill", filled), ("take", taken), ("give", given)):
            setattr(stream, name, watched)
        setattr(drafter, "guess", guessed)  # noqa: B010 - mypy will not have a method replaced


def timeline(nodes: int, limit_Bps: float) -> Timeline:
    """One answer of the demo whose layers stream over a throttled link."""
    seen = Timeline()
    with demo(offload="disk", limit_Bps=limit_Bps) as llm:
        llm.budget = nodes
        llm._decoder.overlap = True
        stream = weights.stream_of(llm._model).stream
        assert isinstance(stream, LayerStream)
        seen.watch(stream, llm._decoder.drafter)
        for burst in llm.stream("This module provides", SamplingParams(temperature=0.0, max_tokens=24)):
            ended = time.perf_counter()
            seen.sweeps.append((ended - burst.sweep_s, ended, burst))
    return seen


def packed_layer(quant: Quant) -> tuple[int, dict[str, Entry]]:
    """Size and tensors, by its header, of the first layer in a pack of the demo."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / quant
        pack(plan(open_folder(DEMO / "target"), quant), out)
        return read_header(out / "layer-00000.safetensors")


@contextmanager
def charged(llm: Engine, costs: tuple[float, ...]) -> Iterator[Charged]:
    """A clock of the engine's own for as long as the block lasts."""
    clock = Charged(*costs)
    try:
        clock.take_over(llm)
        yield clock
    finally:
        for module in (decoder, planner):
            setattr(module, "time", time)  # noqa: B010 - what stood there before


@dataclass(frozen=True)
class Shared:
    """Texts that shared sweeps, and the charged seconds they took."""

    row: Row
    seconds: float


def shared_sweeps(sizes: tuple[int, ...]) -> Iterator[tuple[Shared, Shared]]:
    """For each number of texts: with trees of the automatic budget, and plain."""
    asked = prompts()
    Random(0).shuffle(asked)  # every size gets a mixture of both kinds
    sampling = SamplingParams(temperature=0.8, max_tokens=48, ignore_eos=True)
    for size in sizes:
        chosen: list[Prompt] = list(islice(cycle(asked), size))
        with demo() as llm, charged(llm, STREAMED) as clock:
            costs, now = Costs(), clock.perf_counter
            run(llm, chosen, size, replace(sampling, max_tokens=8), "auto", costs, now)  # the first costs learned
            trees = run(llm, chosen, size, sampling, "auto", costs, now)
            plain = run(llm, chosen, size, sampling, 0, costs, now)
        assert trees.texts == plain.texts, "trees must not change a text"
        yield Shared(trees, trees.seconds), Shared(plain, plain.seconds)


def chances(nodes: int) -> Floats:
    """Chances of the guesses of one sweep over a fresh text, best first, [N]."""
    done, _ = bursts("The with statement is used to", nodes, SamplingParams(temperature=0.8, seed=3, max_tokens=32))
    tree = max((burst.tree for burst in done), key=len)
    best_N: Floats = np.exp(-np.sort(-tree.reach_N))
    return best_N


def cost_model(costs: tuple[float, ...]) -> CostModel:
    """What the engine would have learned on a machine with these costs."""
    stream_s, sweep_s, row_s, pass_s, node_s = costs
    model = CostModel()
    for rows in (1, 4096):
        model.stream.learn(rows, stream_s)
        model.compute.learn(rows, sweep_s + row_s * rows)
        model.draft.learn(rows, pass_s + node_s * rows)
    return model
