"""Promises of a drafter's own layers: what they compute is what transformers computes, of each of their families."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.model.layer import streamed_layers
from specexec.model.cache import KVCache
from specexec.model.quick_layers import FAMILIES, QuickLayer, quicken
from specexec.model.tree_lm import Rows, TreeLM
from tests.tiny import logits_of, tiny

TEXT = [*range(5, 45)]
TREE = {7: -1, 9: 0, 11: 0, 13: 1, 15: -1, 17: 4}  # tokens, and the nodes that they follow
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {},
}


def quick(path: Path, dtype: torch.dtype = torch.float32) -> TreeLM:
    model = offload.load(path, "none", dtype=dtype)
    quicken(model)
    return TreeLM(model, drafts=True)


def paths() -> list[list[int]]:
    """The tokens from the text to each node."""
    found: list[list[int]] = []
    for token, parent in TREE.items():
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


def of_tree(lm: TreeLM) -> torch.Tensor:
    cache = KVCache()
    lm.forward([Rows.text(cache, TEXT)])
    cache.commit(range(len(TEXT)))
    (hidden_RH,) = lm.forward([Rows(cache, [*TREE], [*TREE.values()])])
    return lm.head(hidden_RH)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_of_guesses_has_transformers_logits(family: str, tmp_path: Path) -> None:
    model: PreTrainedModel = tiny(family, tmp_path, num_hidden_layers=2, **OPTIONS[family])
    lm = quick(tmp_path)
    assert all(isinstance(layer.inner, QuickLayer) for layer in streamed_layers(lm.model))
    for found_V, path in zip(of_tree(lm), paths(), strict=True):
        torch.testing.assert_close(found_V, logits_of(model, torch.tensor([TEXT + path]))[0, -1], rtol=1e-4, atol=1e-4)
    lm.close()


def test_in_16_bits_guesses_are_as_near_to_the_truth_as_those_of_transformers(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    true_NV = torch.stack([logits_of(model, torch.tensor([TEXT + path]))[0, -1] for path in paths()])
    narrow = model.bfloat16()
    theirs_NV = torch.stack([logits_of(narrow, torch.tensor([TEXT + path]))[0, -1] for path in paths()]).float()
    lm = quick(tmp_path, torch.bfloat16)
    assert (of_tree(lm) - true_NV).square().mean() < 1.5 * (theirs_NV - true_NV).square().mean()
    lm.close()


def test_layers_of_other_families_stay_as_they_are(tmp_path: Path) -> None:
    tiny("gemma2", tmp_path)
    model = offload.load(tmp_path, "none", dtype=torch.float32)
    before = [type(layer.inner) for layer in streamed_layers(model)]
    quicken(model)
    assert [type(layer.inner) for layer in streamed_layers(model)] == before
