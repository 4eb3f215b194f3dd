"""Decoders over tiny models, and the drafters that every promise is tried with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder, Target
from specexec.model.chain_lm import ChainLM
from specexec.model.tree_lm import Rows, Sweep, TreeLM
from specexec.planning.best_first import REFERENCE_RANKING, BestFirst, Planner
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.text.detokenizer import TextStream
from specexec.text.sequence import Sequence, start
from tests.tiny import VOCABULARY, tiny
from tests.tiny import greedy as tiny_greedy


def spell(tokens: list[int]) -> str:
    """Tokens as numbers, so that text and tokens can be compared."""
    return "".join(f"{token} " for token in tokens)


def prompt(length: int, seed: int = 0, most: int = VOCABULARY) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, (length,), generator=generator).tolist()


def samplings(length: int) -> list[SamplingParams]:
    """Greedy, and by chance: answers of so many tokens."""
    return [
        SamplingParams(temperature=0.0, max_tokens=length),
        SamplingParams(temperature=0.9, top_p=0.9, seed=1, max_tokens=length),
    ]


def random_tree(nodes: int) -> tuple[list[int], list[int]]:
    """Parents and tokens of a tree with at least three roots, whose parents are -1."""
    generator = np.random.default_rng(1)
    parents = [-1, -1, -1, *(int(generator.integers(max(-1, node - 9), node)) for node in range(3, nodes))]
    return parents, generator.integers(0, VOCABULARY, nodes).tolist()


def path_to(parents: Items[int], node: int) -> list[int]:
    """The nodes from a root to this one; -1 is the parent of roots."""
    path: list[int] = []
    while node != -1:
        path.append(node)
        node = parents[node]
    return path[::-1]


def drafters(family: str, folder: Path) -> dict[str, Drafter]:
    """none; useless (another random model); sibling (the target, slightly off); perfect (the target itself); confident.

    A drafter that is right must be trusted: with so small a tau the tree is one chain of its first choices.
    """
    perfect = TreeLM(tiny(family, folder / "again"))
    useless = TreeLM(tiny("llama", folder / "useless", seed=9, num_hidden_layers=1))
    off = tiny(family, folder / "sibling")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in off.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return {
        "none": NoDrafter(),
        "sibling": SiblingDrafter(TreeLM(off), VOCABULARY),
        "useless": SiblingDrafter(useless, VOCABULARY),
        "perfect": SiblingDrafter(perfect, VOCABULARY),
        "confident": SiblingDrafter(perfect, VOCABULARY, Ranking(tau=0.01)),
        "blind": SiblingDrafter(perfect, VOCABULARY, Ranking(shared_noise=False)),
        "reference": SiblingDrafter(perfect, VOCABULARY, REFERENCE_RANKING),
    }


class TargetAndDrafters:
    """A tiny llama, and the drafters to try it with."""

    def __init__(self, folder: Path) -> None:
        self.target = TreeLM(tiny("llama", folder / "target"))
        self.drafters = drafters("llama", folder)


def sequence_of(
    tokens: Items[int], sampling: SamplingParams, limit: int = 512, vocabulary: int = VOCABULARY
) -> Sequence:
    text = TextStream(spell, sampling.stop or ())
    return start(tokens, sampling, Noise(sampling.seed or 0, vocabulary), text, frozenset(), limit)


def write(
    target: TreeLM | ChainLM,
    drafter: Drafter,
    prompts: Items[Items[int]],
    sampling: SamplingParams | Items[SamplingParams],
    budget: int | Literal["auto"] = 64,
    planner: Planner | None = None,
    overlap: bool | None = None,
    vocabulary: int = VOCABULARY,
    limit: int = 512,
) -> list[Sequence]:
    """All prompts together, to their end; one sampling for all, or one each."""
    decoder = Decoder(target, drafter, planner or BestFirst(), budget, overlap=overlap)
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    sequences = [sequence_of(*one, limit, vocabulary) for one in zip(prompts, each, strict=True)]
    for sequence in sequences:
        decoder.join(sequence)
    while decoder.live:
        decoder.step()
    return sequences


_PLAIN: WeakKeyDictionary[TreeLM | ChainLM, dict[object, list[list[int]]]] = WeakKeyDictionary()


def plain_texts(
    target: TreeLM | ChainLM,
    prompts: Items[Items[int]],
    sampling: SamplingParams,
    vocabulary: int = VOCABULARY,
    limit: int = 512,
) -> list[list[int]]:
    """The answers without a drafter, all prompts together; written once for each target."""
    known = _PLAIN.setdefault(target, {})
    key = tuple(map(tuple, prompts)), sampling, vocabulary, limit
    if key not in known:
        written = write(target, NoDrafter(), prompts, sampling, 0, vocabulary=vocabulary, limit=limit)
        known[key] = [one.answer for one in written]
    return known[key]


def texts_are_plain(
    target: TreeLM, drafter: Drafter, prompts: Items[list[int]], sampling: SamplingParams, vocabulary: int,
    overlap: bool | None = None,
) -> None:  # fmt: skip
    """Three texts side by side in trees of 24 nodes are those of plain decoding, and the drafter never failed."""
    expected = plain_texts(target, prompts, sampling, vocabulary)
    ahead = sampling.temperature != 0 if overlap is None else overlap
    decoder = Decoder(target, drafter, BestFirst(), 24, overlap=ahead)
    sequences = [sequence_of(tokens, sampling, vocabulary=vocabulary) for tokens in prompts]
    for sequence in sequences:
        decoder.join(sequence)
    while decoder.live:
        decoder.step()
    assert [one.answer for one in sequences] == expected
    assert not decoder.guarded.failure


def rows_read(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, how many tokens the target reads in each sweep."""
    read: list[int] = []
    begin = target.begin

    def counted(parts: list[Rows]) -> Sweep:
        read.append(sum(len(part.tokens) for part in parts))
        return begin(parts)

    monkeypatch.setattr(target, "begin", counted)
    return read


def last_rows(model: Callable[[Tensor], Tensor], texts: Items[list[int]]) -> Tensor:
    """[texts, C]: what a model of ids [N, T] → [N, T, C] computes for the last token of each text.

    Those of one length go through it side by side, as a batch without padding: a forward for each takes longer.
    """
    alike = defaultdict[int, list[int]](list)
    for place, text in enumerate(texts):
        alike[len(text)].append(place)
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for places in alike.values():
            rows |= zip(places, model(torch.tensor([texts[place] for place in places]))[:, -1], strict=True)
    return torch.stack([rows[place] for place in range(len(texts))])


def greedy(model: PreTrainedModel, tokens: Items[int], count: int) -> list[int]:
    """What transformers' own generate writes. The model must not have been given to a TreeLM."""
    with torch.no_grad():
        return tiny_greedy(model, torch.tensor([list(tokens)]), count)[0, len(tokens) :].tolist()
