"""Layers whose rows attend to the keys that an index chooses: trees and texts beyond the index are transformers' own.

Tiny random models (tests/zoo.py) whose index chooses 12 keys, with prompts and answers much longer than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import offload
from offload.placement.requirements import cache_widths
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.architecture import Index
from specexec.model.attention import Style, Visibility
from specexec.model.cache import KVCache, LayerKV
from specexec.model.indexed import choose
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import VOCABULARY
from tests.writing import greedy, path_to, prompt, write
from tests.zoo import tiny_of

FAMILIES = ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "minimax_m3_vl_text", "deepseek_v4"]
PROMPTS = [prompt(length, seed=length, most=200) for length in (3, 40, 90)]
COUNT = 16


@dataclass
class Case:
    """A streamed target, drafters, and what transformers' own generate writes."""

    folder: Path
    target: TreeLM
    drafters: dict[str, Drafter]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    truth = tiny_of(request.param, folder)
    expected = [greedy(truth, tokens, COUNT) for tokens in PROMPTS]
    target = TreeLM(offload.load(folder, "disk"))
    perfect = SiblingDrafter(TreeLM(truth), VOCABULARY)
    yield Case(folder, target, {"none": NoDrafter(), "perfect": perfect}, expected)
    target.close()


@pytest.mark.parametrize(("drafter", "budget"), [("none", 0), ("perfect", 24)])
def test_three_texts_at_once_are_those_of_generate(case: Case, drafter: str, budget: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT)
    texts = write(case.target, case.drafters[drafter], PROMPTS, sampling, budget=budget)
    assert [text.answer for text in texts] == case.expected


def test_what_a_token_keeps_is_what_is_counted(case: Case) -> None:
    cache, folder = KVCache(), offload.open_folder(case.folder)
    case.target.forward([Rows.text(cache, PROMPTS[0])])
    kept = [kv.keys_HRD[:, 0].numel() + kv.values_HRD[:, 0].numel() for _, kv in sorted(cache.layers.items())]
    counted = cache_widths(folder.config)
    assert all(number <= most for number, most in zip(kept, counted, strict=True))
    assert max(kept) == max(counted)


def test_the_best_visible_keys_are_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    index, committed, nodes = Index(heads=4, width=8, most=5), 9, 7
    parents = [-1, -1, 0, 1, 2, 2, 4]
    enter = {0: 0, 2: 1, 4: 2, 6: 3, 5: 4, 1: 5, 3: 6}
    leave = {0: 5, 2: 5, 4: 4, 6: 4, 5: 5, 1: 7, 3: 7}  # depth first: 0 2 4 6 5, 1 3
    depth = {node: len(path_to(parents, node)) - 1 for node in range(nodes)}
    sees = Visibility(
        committed,
        torch.tensor([committed + depth[node] for node in range(nodes)]),
        torch.tensor([enter[node] for node in range(nodes)]),
        torch.tensor([leave[node] for node in range(nodes)]),
    )
    rows = torch.randn(nodes, 4 * 8 + 4 + 8, generator=generator)
    keys = torch.randn(1, committed + nodes, 16, generator=generator)
    (chosen,) = choose(rows, LayerKV(keys, keys), sees, slice(0, nodes), index, Style(1.0))
    assert chosen is not None
    for node in range(nodes):
        visible = [*range(committed), *(committed + one for one in path_to(parents, node))]
        query, weight = rows[node, :32].view(4, 8), rows[node, 32:36]
        score = {key: float((weight * torch.relu(query @ keys[0, key, :8])).sum()) for key in visible}
        best = sorted(visible, key=lambda key: -score[key])[: index.most]
        assert {*chosen[0, node].tolist()} == {*best}
