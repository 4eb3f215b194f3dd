"""Attention of many texts at once against that of each alone.   H heads   Q queries   K keys   D size"""

import numpy as np
import pytest
import torch

from specexec.model.attention import Style, Visibility, attend
from specexec.model.cache import LayerKV
from specexec.model.joint_attention import TextRows, joined
from specexec.sizes import KEY_BLOCK, QUERY_BLOCK
from specexec.tree.tree import ROOT, depths, intervals

HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 4, 2, 8, 6
STYLES = {
    "full": Style(0.3),
    "window": Style(0.3, window=4),
    "chunk": Style(0.3, chunk=8),
    "all_at_once": Style(0.3, window=4, softcap=2.0, sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}
# Committed tokens, nodes that were there before, and new nodes: newcomers, short and long texts, one beyond a block.
TEXTS = [
    (0, 0, 9),
    (30, 4, 1),
    (31, 0, 7),
    (25, 3, 5),
    (700, 0, 2),
    (5, 0, 1),
    (29, 0, 6),
    (KEY_BLOCK, 0, 3),
    (0, 0, 300),
]


def pieces() -> list[tuple[TextRows, LayerKV]]:
    """Trees of random shape, their rows side by side in one sweep."""
    generator, start = np.random.default_rng(0), 0
    made: list[tuple[TextRows, LayerKV]] = []
    for committed, old, new in TEXTS:
        parents_N = np.array(
            [int(generator.integers(max(ROOT, node - 5), node)) for node in range(old + new)], np.int64
        )
        times = intervals(parents_N)
        position_R = torch.from_numpy(depths(parents_N) + committed)
        sees = Visibility(committed, position_R, torch.from_numpy(times.enter_N), torch.from_numpy(times.leave_N))
        room = committed + old + new + 40  # caches hold more memory than rows; what is in it must not matter
        kv = LayerKV(torch.randn(KEY_HEADS, room, SIZE), torch.randn(KEY_HEADS, room, VALUE_SIZE))
        kv.keys_HRD[:, committed + old + new :] = torch.nan
        kv.values_HRD[:, committed + old + new :] = torch.nan
        made.append((TextRows(len(made), slice(start, start + new), slice(old, old + new), sees), kv))
        start += new
    return made


@pytest.mark.parametrize("name", STYLES)
def test_attention_of_a_text_is_the_same_in_a_group_as_alone(name: str) -> None:
    torch.manual_seed(0)
    style, made = STYLES[name], pieces()
    for piece, kv in made:  # rows that no query sees may never have come from where they live
        kv.values_HRD[:, : piece.sees.first_visible(piece.rows, style)] = torch.nan
    query_HQD = torch.randn(HEADS, sum(new for _, _, new in TEXTS), SIZE)
    kv_of = {piece.text: kv for piece, kv in made}
    found: dict[int, torch.Tensor] = {}
    for group in joined([piece for piece, _ in made], style):
        kvs = [kv_of[piece.text] for piece in group.pieces]
        texts = [piece.text for piece in group.pieces]
        found.update(zip(texts, group.attend(query_HQD, kvs, style), strict=True))
    assert found.keys() == kv_of.keys()
    for piece, kv in made:
        alone = attend(query_HQD[:, piece.here], kv.keys_HRD, kv.values_HRD, piece.sees, piece.rows, style)
        torch.testing.assert_close(found[piece.text], alone, atol=1e-6, rtol=1e-5)


def test_texts_of_like_size_are_grouped_and_no_group_outgrows_a_block() -> None:
    everyone = joined([piece for piece, _ in pieces()], STYLES["full"])
    sizes = [len(group.pieces) for group in everyone]
    assert max(sizes) == 3  # the three short texts with a few nodes each
    many = [piece for _ in range(20) for piece, _ in pieces()]
    for group in joined(many, STYLES["full"]):
        count = len(group.pieces)
        if count > 1:
            assert count * max(piece.keys for piece in group.pieces) <= KEY_BLOCK
            assert count * max(piece.queries for piece in group.pieces) <= QUERY_BLOCK
