"""Every architecture, streamed from disk through the public decoder: transformers' text, each node its own path's.

References are unmodified transformers models on prefix + path, without cache and without mask. Windows are 8 tokens,
the prefix is 33: every node lies beyond the window. Controls that must fail show that the tolerance means something.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from specexec.drafters.sibling import SiblingDrafter
from specexec.errors import UnsupportedArchitecture
from specexec.model import sweep_rows
from specexec.model.architecture import LayerKind
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from specexec.tree.tree import Ints
from tests.tiny import FAMILIES, VOCABULARY, WINDOW, tiny
from tests.writing import greedy, last_rows, path_to, prompt, random_tree, write

PREFIX = prompt(33)
NODES = 40
PARENTS, TOKENS = random_tree(NODES)
path_of = partial(path_to, PARENTS)
WINDOWED = ["mistral", "phi3", "gemma2", "gemma3_text", "gpt_oss"]
TYPED = {"gemma2", "gemma3_text", "gpt_oss"}  # a mask for each type of layer
# These have no sdpa path of their own in transformers.
EAGER_ONLY = {"gemma2", "gpt_oss"}


def reference(folder: Path, attention: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model


def path_logits(model: PreTrainedModel, prefix: list[int]) -> Tensor:
    """[NODES, V]: those of each node's own path."""
    texts = [[*prefix, *(TOKENS[one] for one in path_of(node))] for node in range(NODES)]
    return last_rows(lambda ids: model(ids, use_cache=False).logits, texts)


def tree_logits(lm: TreeLM, cache: KVCache, parents: list[int] | None = None) -> Tensor:
    """[NODES, V]: all nodes in one sweep below the committed text."""
    (hidden,) = lm.forward([Rows(cache, TOKENS, parents or PARENTS)])
    return lm.head(hidden)


def committed(lm: TreeLM, tokens: list[int]) -> KVCache:
    cache = KVCache()
    lm.forward([Rows(cache, tokens, range(-1, len(tokens) - 1))])
    cache.commit(range(len(tokens)))
    return cache


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_greedy_text_streamed_from_disk_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    truth = tiny(family, tmp_path / "model", max_shard_size="60KB")
    target = TreeLM(offload.load(tmp_path / "model", "disk"))
    drafter = SiblingDrafter(TreeLM(offload.load(tmp_path / "model", "none")), VOCABULARY)
    prompts = [prompt(length, seed=length) for length in (1, 5, 60)]
    together = write(target, drafter, prompts, SamplingParams(temperature=0.0, max_tokens=12), budget=64)
    assert [sequence.answer for sequence in together] == [greedy(truth, tokens, 12) for tokens in prompts]
    stream = offload.stream_of(target.model)
    assert stream.stats().layers_read % stream.layers == 0


def test_every_node_has_the_logits_of_its_own_path(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path)
    lm = TreeLM(offload.load(tmp_path, "none"))
    expected = path_logits(reference(tmp_path, "eager"), PREFIX)
    cache = committed(lm, PREFIX)
    torch.testing.assert_close(tree_logits(lm, cache), expected, atol=1e-4, rtol=0)
    if family not in EAGER_ONLY:
        torch.testing.assert_close(expected, path_logits(reference(tmp_path, "sdpa"), PREFIX), atol=1e-4, rtol=0)

    # Accept a path that leaves gaps, and hang the same tree below it.
    path = path_of(NODES - 1)
    cache.commit(path)
    longer = [*PREFIX, *(TOKENS[node] for node in path)]
    assert cache.tokens == longer
    expected = path_logits(reference(tmp_path, "eager"), longer)
    torch.testing.assert_close(tree_logits(lm, cache), expected, atol=1e-4, rtol=0)

    # The cache then holds what a fresh run of the accepted text would.
    cache.forget_nodes()
    fresh = committed(lm, longer)
    for layer, kv in fresh.layers.items():
        ours = cache.layers[layer].keys_HRD[:, : len(longer)]
        torch.testing.assert_close(ours, kv.keys_HRD[:, : len(longer)], atol=1e-4, rtol=0)


def float_mask(window: int | None) -> Tensor:
    """[1, 1, R, R] over prefix and tree in one row of slots: 0 where a row sees another, the lowest float elsewhere."""
    slots = [[*range(slot + 1)] for slot in range(len(PREFIX))]
    slots += [[*range(len(PREFIX)), *(len(PREFIX) + one for one in path_of(node))] for node in range(NODES)]
    mask = torch.full((len(slots), len(slots)), torch.finfo(torch.float32).min)
    for slot, seen in enumerate(slots):  # `seen` is in order of position: a window is its last entries
        mask[slot, seen if window is None else seen[-window:]] = 0.0
    return mask[None, None]


def test_every_node_has_the_logits_of_transformers_own_masked_forward(family: str, tmp_path: Path) -> None:
    """The unmodified model on prefix and tree at once, with one float mask, or one per type of layer."""
    tiny(family, tmp_path)
    lm = TreeLM(offload.load(tmp_path, "none"))
    truth = reference(tmp_path, "eager")
    mask: Tensor | dict[str, Tensor] = float_mask(WINDOW if family in WINDOWED else None)
    if family in TYPED:
        mask = {"full_attention": float_mask(None), "sliding_attention": float_mask(WINDOW)}
    positions = [*range(len(PREFIX)), *(len(PREFIX) + len(path_of(node)) - 1 for node in range(NODES))]
    with torch.no_grad():
        expected: Tensor = truth(
            torch.tensor([[*PREFIX, *TOKENS]]),
            attention_mask=mask,
            position_ids=torch.tensor([positions]),
            use_cache=False,
        ).logits[0, len(PREFIX) :]
    torch.testing.assert_close(tree_logits(lm, committed(lm, PREFIX)), expected, atol=1e-4, rtol=0)


def test_the_controls_fail(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree read as a chain, and positions counted by slot, are wrong by far more than the tolerance."""
    tiny(family, tmp_path)
    lm = TreeLM(offload.load(tmp_path, "none"))
    expected = path_logits(reference(tmp_path, "eager"), PREFIX)
    chained = tree_logits(lm, committed(lm, PREFIX), parents=list(range(-1, NODES - 1)))
    assert (chained - expected).abs().max() > 0.5
    cache = committed(lm, PREFIX)

    def slots(parents_N: Ints) -> Ints:
        return np.arange(len(parents_N))

    monkeypatch.setattr(sweep_rows, "depths", slots)
    assert (tree_logits(lm, cache) - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", WINDOWED)
def test_a_forgotten_window_is_noticed(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path)
    lm = TreeLM(offload.load(tmp_path, "none"))
    assert any(kind.window for kind in lm.kinds)
    lm.kinds = [LayerKind(window=10**6 if kind.window else None) for kind in lm.kinds]
    with pytest.raises(UnsupportedArchitecture, match="window"):
        committed(lm, PREFIX)


def test_a_long_prompt_in_pieces_equals_the_prompt_at_once(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path)
    lm = TreeLM(offload.load(tmp_path, "disk"))
    tokens = prompt(300)
    (hidden,) = lm.forward([Rows(KVCache(), tokens, range(-1, len(tokens) - 1))])
    stream = offload.stream_of(lm.model)
    assert stream.stats().layers_read == stream.layers  # pieces, but one visit of the weights
    with torch.no_grad():
        expected = reference(tmp_path, "eager")(torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(lm.head(hidden), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_other_texts_do_not_move_a_single_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Linears run in fixed row tiles: 1 row, 40 rows or 300 rows of others beside it, a row's result is the same."""
    tiny(family, tmp_path)
    lm = TreeLM(offload.load(tmp_path, "none", dtype=dtype))

    def own_rows(*others: list[int]) -> Tensor:
        parts = [Rows(KVCache(), tokens, range(-1, len(tokens) - 1)) for tokens in ([7], prompt(23), *others)]
        return torch.cat(lm.forward(parts)[:2])

    alone = own_rows()
    assert torch.equal(own_rows(prompt(17, seed=4)), alone)
    assert torch.equal(own_rows(prompt(300, seed=5), prompt(3)), alone)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TreeLM, PreTrainedModel]:
    """One model with sliding and full layers, for us and for transformers."""
    folder = tmp_path_factory.mktemp("gemma3")
    tiny("gemma3_text", folder)
    return TreeLM(offload.load(folder, "none")), reference(folder, "eager")


@settings(max_examples=12)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=12))
def test_a_tree_of_any_shape_gives_each_node_its_path(
    windowed: tuple[TreeLM, PreTrainedModel], picks: list[int]
) -> None:
    parents = [pick % (node + 1) - 1 for node, pick in enumerate(picks)]
    lm, truth = windowed
    (hidden,) = lm.forward([Rows(committed(lm, PREFIX), TOKENS[: len(picks)], parents)])
    texts = [[*PREFIX, *(TOKENS[one] for one in path_to(parents, node))] for node in range(len(picks))]
    expected = last_rows(lambda ids: truth(ids, use_cache=False).logits, texts)
    torch.testing.assert_close(lm.head(hidden), expected, atol=1e-4, rtol=0)
