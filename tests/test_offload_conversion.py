"""Bytes land where transformers' own conversion operations would have put them, for every chain that is supported."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, core_model_loading
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    SplitModulelist,
    Transpose,
)

from offload.checkpoint.block import Block, TensorPart
from offload.checkpoint.headers import read_header
from offload.checkpoint.layout import Checkpoint
from offload.checkpoint.mapping import Job
from offload.errors import OffloadError, UnsupportedModel
from offload.stream.store import Arena, DiskStore

Chain = tuple[Sequence[ConversionOps], dict[str, list[tuple[int, ...]]], dict[str, tuple[int, ...]]]
EXPERTS = 3
CHAINS: dict[str, Chain] = {
    "plain": ([], {"a": [(4, 6)]}, {"a": (4, 6)}),
    "scalar": ([], {"a": [()]}, {"a": ()}),
    "transposed": ([Transpose(0, 1)], {"a": [(4, 6)]}, {"b": (6, 4)}),
    "inner transposed": ([Transpose(1, 2)], {"a": [(2, 4, 6)]}, {"b": (2, 6, 4)}),
    "fused rows": ([Concatenate(dim=0)], {"q": [(4, 6)], "k": [(2, 6)], "v": [(2, 6)]}, {"qkv": (8, 6)}),
    "fused columns": ([Concatenate(dim=1)], {"q": [(4, 6)], "k": [(4, 3)]}, {"qk": (4, 9)}),
    "chunked": ([Chunk(dim=0)], {"qkv": [(12, 5)]}, {"q": (4, 5), "k": (4, 5), "v": (4, 5)}),
    "stacked": ([MergeModulelist(dim=0)], {"w": [(4, 6)] * EXPERTS}, {"down": (EXPERTS, 4, 6)}),
    "stacked and joined": (
        [MergeModulelist(dim=0), Concatenate(dim=1)],
        {"w1": [(4, 6)] * EXPERTS, "w3": [(4, 6)] * EXPERTS},
        {"gate_up": (EXPERTS, 8, 6)},
    ),
    "stacked and joined inside": (
        [MergeModulelist(dim=0), Concatenate(dim=2)],
        {"w1": [(4, 6)] * EXPERTS, "w3": [(4, 2)] * EXPERTS},
        {"gate_up": (EXPERTS, 4, 8)},
    ),
}
# Younger than the oldest transformers we run with.
if hasattr(core_model_loading, "Split"):
    CHAINS["split"] = (
        [core_model_loading.Split(dim=0)],
        {"qkv": [(8, 5)]},
        {"q": (4, 5), "k": (2, 5), "v": (2, 5)},
    )


if hasattr(core_model_loading, "PermuteForRope"):
    PAIRS = core_model_loading.PermuteForRope
    CHAINS["pairs apart"] = ([PAIRS()], {"q": [(24, 5)]}, {"q": (24, 5)})
    CHAINS["pairs apart in a bias"] = ([PAIRS(subconfig_key="seen")], {"q": [(12,)]}, {"q": (12,)})
    CHAINS["pairs side by side"] = ([PAIRS(inverse=True)], {"q": [(24, 5)]}, {"q": (24, 5)})
    CHAINS["chunked, pairs apart"] = (
        [Chunk(dim=0), PAIRS(permute_layer_names=["q_proj", "k_proj"])],
        {"qkv": [(36, 5)]},
        {"q_proj": (12, 5), "k_proj": (12, 5), "v_proj": (12, 5)},
    )
CONFIG = LlamaConfig(hidden_size=96, num_attention_heads=2)
CONFIG.seen = LlamaConfig(hidden_size=96, num_attention_heads=3)


class Shapes:
    """The little that `Split` asks of a model."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name])


def stored(path: Path, chain: Chain) -> tuple[dict[str, list[torch.Tensor]], Job]:
    operations, sources, targets = chain
    tensors = {name: [torch.randn(shape) for shape in shapes] for name, shapes in sources.items()}
    named = {f"{name}.{i}": tensor for name, group in tensors.items() for i, tensor in enumerate(group)}
    save_file(named, path)
    _, entries = read_header(path)
    ordered = {name: [entries[f"{name}.{i}"] for i in range(len(group))] for name, group in tensors.items()}
    return tensors, Job(operations, ordered, list(targets), CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHAINS)
def test_supported_chains_equal_transformers_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    operations, sources, targets = CHAINS[name]
    file = tmp_path / "model.safetensors"
    tensors, job = stored(file, CHAINS[name])
    expected: Mapping[str, torch.Tensor | list[torch.Tensor]] = tensors
    for operation in operations:
        expected = operation.convert(
            dict(expected),
            source_patterns=list(sources),
            target_patterns=list(targets),
            full_layer_name=next(iter(targets)),
            model=Shapes(targets),
            config=CONFIG,
        )
    parts = list(job.parts({target: torch.Size(shape) for target, shape in targets.items()}))
    pieces, offset = [], 0
    for target, shape in targets.items():
        own = tuple(part for part in parts if part.target == target)
        pieces.append(TensorPart(target, dtype, shape, offset, own))
        offset += 1024
    block = Block("block", tuple(pieces))
    arena = Arena(block.size_B)
    DiskStore(Checkpoint(tmp_path, (block,), (), {file: file.stat().st_size})).read_block(block, arena)
    for target, found in block.views(arena.flat).items():
        wanted = expected[target]
        wanted = wanted[0] if isinstance(wanted, list) else wanted
        assert torch.equal(found, wanted.to(dtype)), target


@pytest.mark.parametrize("operations", [[SplitModulelist(dim=0)], [Transpose(0, 1), Transpose(0, 1)], [Chunk(dim=1)]])
def test_other_chains_are_refused_by_name(operations: list[ConversionOps], tmp_path: Path) -> None:
    _, job = stored(tmp_path / "model.safetensors", (operations, {"a": [(4, 4)]}, {"b": (4, 4)}))
    with pytest.raises(UnsupportedModel, match=rf"'a\.0' needs the conversion.*{type(operations[0]).__name__}"):
        list(job.parts({"b": torch.Size((4, 4))}))


@pytest.mark.parametrize(
    ("operations", "sources", "targets"),
    [
        ([Chunk(dim=0)], {"a": [(7, 2)]}, {"b": (4, 2), "c": (4, 2)}),
        ([Chunk(dim=0)], {"a": [()]}, {"b": (), "c": ()}),
        ([Concatenate(dim=0)], {"a": [(4, 2)], "b": [(5, 2)]}, {"c": (8, 2)}),
        ([Concatenate(dim=1)], {"a": [(4,)], "b": [(4,)]}, {"c": (8,)}),
        ([MergeModulelist(dim=0)], {"a": [(4, 2)] * 2}, {"c": (3, 4, 2)}),
        ([MergeModulelist(dim=0), Concatenate(dim=1)], {"a": [()] * 2, "b": [()] * 2}, {"c": (2, 4)}),
        ([Transpose(0, 1)], {"a": [(4, 2)]}, {"b": (4, 2)}),
        ([core_model_loading.PermuteForRope()], {"a": [(6, 2)]}, {"b": (6, 2)}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    operations: list[ConversionOps],
    sources: dict[str, list[tuple[int, ...]]],
    targets: dict[str, tuple[int, ...]],
    tmp_path: Path,
) -> None:
    _, job = stored(tmp_path / "model.safetensors", (operations, sources, targets))
    with pytest.raises(OffloadError):
        list(job.parts({name: torch.Size(shape) for name, shape in targets.items()}))
