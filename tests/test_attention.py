"""Packed attention against a dense softmax over explicitly listed ancestors.   H heads   Q queries   K keys   D size"""

import numpy as np
import pytest
import torch
from torch import Tensor

from specexec.model import attention
from specexec.model.attention import Style, Visibility, attend
from specexec.tree.tree import ROOT, depths, intervals

COMMITTED, NODES, HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 37, 23, 4, 2, 8, 6
GENERATOR = np.random.default_rng(0)
PARENTS = [ROOT, *(int(GENERATOR.integers(max(ROOT, node - 5), node)) for node in range(1, NODES))]

STYLES = {
    "full": Style(0.3),
    "rough": Style(0.3, rough=True),
    "rough_window": Style(0.3, window=5, rough=True),
    "window": Style(0.3, window=5),
    "window_beyond_the_prefix": Style(0.3, window=2),
    "chunk": Style(0.3, chunk=8),
    "softcap": Style(0.3, softcap=2.0),
    "sinks": Style(0.3, sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all_at_once": Style(0.3, window=4, softcap=2.0, sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def visibility() -> Visibility:
    parents_N = np.array(PARENTS, np.int64)
    times = intervals(parents_N)
    position_R = torch.from_numpy(depths(parents_N) + COMMITTED)
    return Visibility(COMMITTED, position_R, torch.from_numpy(times.enter_N), torch.from_numpy(times.leave_N))


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows = COMMITTED + NODES
    return torch.randn(HEADS, NODES, SIZE), torch.randn(KEY_HEADS, rows, SIZE), torch.randn(KEY_HEADS, rows, VALUE_SIZE)


def dense(query_HQD: Tensor, key_HKD: Tensor, value_HKD: Tensor, style: Style) -> Tensor:
    """Each node over a list of the rows it sees, in float64."""
    mixed = torch.zeros(HEADS, NODES, VALUE_SIZE, dtype=torch.float64)
    for node in range(NODES):
        path, above = [], node
        while above != ROOT:
            path.append(above)
            above = PARENTS[above]
        seen = list(range(COMMITTED)) + [COMMITTED + one for one in reversed(path)]  # in order of position
        last = len(seen) - 1
        positions = [
            p
            for p in range(len(seen))
            if (style.window is None or last - p < style.window)
            and (style.chunk is None or last // style.chunk == p // style.chunk)
        ]
        rows = [seen[p] for p in positions]
        for head in range(HEADS):
            keys, values = key_HKD[head // 2, rows].double(), value_HKD[head // 2, rows].double()
            scores = keys @ query_HQD[head, node].double() * style.scale
            if style.softcap:
                scores = torch.tanh(scores / style.softcap) * style.softcap
            if style.sinks_H is not None:
                scores = torch.cat([scores, style.sinks_H[head : head + 1].double()])
            mixed[head, node] = scores.softmax(0)[: len(rows)] @ values
    return mixed


@pytest.mark.parametrize("blocks", [(256, 1024), (5, 7), (1, 64)])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_node_sees_text_and_ancestors_only(
    style: Style, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(attention, "KEY_BLOCK", blocks[1])
    query, key, value = drawn()
    mixed = attend(query, key, value, visibility(), slice(0, NODES), style)
    torch.testing.assert_close(mixed.double(), dense(query, key, value, style), atol=2e-6, rtol=1e-5)


def test_rows_in_pieces_equal_rows_at_once() -> None:
    query, key, value = drawn()
    whole = attend(query, key, value, visibility(), slice(0, NODES), STYLES["window"])
    pieces = [
        attend(
            query[:, a:b],
            key[:, : COMMITTED + b],
            value[:, : COMMITTED + b],
            visibility(),
            slice(a, b),
            STYLES["window"],
        )
        for a, b in [(0, 9), (9, 16), (16, NODES)]
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("style", [STYLES[name] for name in ("full", "window", "softcap")])
def test_few_rows_have_the_bits_that_they_have_among_many(style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = drawn()
    few = attend(query, key, value, visibility(), slice(0, NODES), style)
    monkeypatch.setattr(attention, "AT_ONCE", 0)
    assert torch.equal(attend(query, key, value, visibility(), slice(0, NODES), style), few)


def test_a_stranger_would_be_noticed() -> None:
    """The control: letting every node see its neighbour moves the result by far more than the tolerance above."""
    query, key, value = drawn()
    sees = visibility()
    chain = Visibility(COMMITTED, sees.position_R, torch.arange(NODES), torch.full((NODES,), NODES))
    wrong = attend(query, key, value, chain, slice(0, NODES), STYLES["full"])
    assert (wrong - dense(query, key, value, STYLES["full"])).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(30))
def test_what_is_hidden_is_what_is_no_ancestor_however_long_the_prompt(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of any length, then guesses in an order that is no depth-first one; against a list of ancestors."""
    monkeypatch.setattr(attention, "KEY_BLOCK", 4)
    numbers, most = np.random.default_rng(seed), 40
    prompt, committed = int(numbers.integers(0, 33)), int(numbers.integers(0, 7))
    parents = [one - 1 if one < prompt else int(numbers.integers(max(prompt - 1, ROOT), one)) for one in range(most)]
    times = intervals(np.array(parents, np.int64))
    position_R = torch.from_numpy(depths(np.array(parents, np.int64)) + committed)
    sees = Visibility(committed, position_R, torch.from_numpy(times.enter_N), torch.from_numpy(times.leave_N))
    hidden_NN = torch.ones(most, most, dtype=torch.bool)
    for node in range(most):
        above = node
        while above != ROOT:
            hidden_NN[node, above], above = False, parents[above]
    hidden_NK = torch.cat([torch.zeros(most, committed, dtype=torch.bool), hidden_NN], 1)
    skipped = 0
    for start in range(0, most, 4):
        queries = slice(start, start + 4)
        for first in range(0, committed + start + 4, 4):
            last = min(first + 4, committed + start + 4)
            found = sees.hidden(queries, first, last, Style(1.0))
            expected = hidden_NK[queries, first:last]
            assert torch.equal(torch.zeros_like(expected) if found is None else found, expected)
            skipped += found is None and last > committed + 1
    assert prompt < 12 or skipped, "blocks of a long prompt need no mask"


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.local])
@pytest.mark.parametrize("committed", [0, 5])
def test_a_long_prompt_leaves_out_blocks_that_a_window_hides_and_keeps_every_bit(
    name: str, committed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree hangs at its end: what is left out is hidden from its nodes, too."""
    monkeypatch.setattr(attention, "KEY_BLOCK", 16)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    prompt, style = 90, STYLES[name]
    parents_N = np.array([*range(-1, prompt - 1), *([prompt - 1] * 3), prompt, prompt + 1, prompt + 3], np.int64)
    times, rows = intervals(parents_N), len(parents_N)
    position_R = torch.from_numpy(depths(parents_N) + committed)
    sees = Visibility(committed, position_R, torch.from_numpy(times.enter_N), torch.from_numpy(times.leave_N))
    torch.manual_seed(1)
    query_HQD = torch.randn(HEADS, rows, SIZE)
    key_HKD, value_HKD = (torch.randn(KEY_HEADS, committed + rows, size) for size in (SIZE, VALUE_SIZE))
    found_HQD = attend(query_HQD, key_HKD, value_HKD, sees, slice(0, rows), style)
    assert sees.first_needed(slice(rows - 8, rows), style) >= 48
    monkeypatch.setattr(Visibility, "first_needed", Visibility.first_visible)
    whole_HQD = attend(query_HQD, key_HKD, value_HKD, sees, slice(0, rows), style)
    if style.rough:
        assert torch.allclose(found_HQD, whole_HQD, atol=1e-6)
    else:
        assert torch.equal(found_HQD, whole_HQD)
