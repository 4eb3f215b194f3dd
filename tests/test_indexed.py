"""Layers whose rows attend to the keys that an index chooses: trees and texts beyond the index are transformers' own.

Tiny random models (tests/zoo.py) whose index chooses 12 keys, with prompts and answers much longer than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

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
COUNT = 12


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


ALIKE = Index(heads=2, width=64, most=40)


def chosen_by_the_first(
    nodes: int, rows_NF: Tensor, keys_KD: Tensor, index: Index = ALIKE, committed: int = 300
) -> Tensor:
    """What the first of so many nodes, each of which follows the text, chooses."""
    enter_N = torch.arange(nodes)
    sees = Visibility(committed, torch.full((nodes,), committed), enter_N, enter_N + 1)
    keys = keys_KD[None, : committed + nodes]
    (chosen,) = choose(rows_NF[:nodes], LayerKV(keys, keys), sees, slice(0, nodes), index, Style(1.0))
    assert chosen is not None
    return chosen[:, 0]


@pytest.mark.parametrize("block", [0, 4], ids=["keys", "blocks of keys"])
def test_rounding_chooses_alike_whatever_other_rows_there_are(block: int) -> None:
    generator, width = torch.Generator().manual_seed(0), ALIKE.width
    order = torch.randperm(width, generator=generator)
    query, keys = (torch.randn(rows, width // 2, generator=generator) for rows in (120 * 2, 420))
    # Every exact product is zero: rounding alone decides.
    query, keys = torch.cat([query, -query], 1)[:, order], torch.cat([keys, keys], 1)[:, order]
    rows = torch.cat([query.view(120, -1), torch.rand(120, 2, generator=generator), torch.zeros(120, width)], 1)
    index = replace(ALIKE, block=block, local=1) if block else ALIKE
    alone = chosen_by_the_first(1, rows, keys, index)
    for nodes in (2, 5, 16, 120):
        assert torch.equal(chosen_by_the_first(nodes, rows, keys, index), alone), nodes


def test_of_equal_scores_the_first_is_chosen() -> None:
    rows = torch.zeros(120, 2 * 64 + 2 + 64)
    for nodes in (1, 5, 120):
        assert chosen_by_the_first(nodes, rows, torch.ones(420, 64)).tolist() == [list(range(ALIKE.most))]


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_a_text_with_equal_scores_is_one_in_trees_and_without(family: str, tmp_path: Path) -> None:
    truth = tiny_of(family, tmp_path)
    for name, weight in truth.named_parameters():
        if name.endswith("weights_proj.weight"):
            weight.data.zero_()
    target, perfect = TreeLM(truth), SiblingDrafter(TreeLM(tiny_of(family, tmp_path)), VOCABULARY)
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT // 2)
    plain, guessed = (
        [text.answer for text in write(target, drafter, PROMPTS, sampling, budget=budget)]
        for drafter, budget in ((NoDrafter(), 0), (perfect, 24))
    )
    target.close()
    assert plain == guessed
