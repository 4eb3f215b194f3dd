"""The tower of a model that sees: images become rows that its language model reads. Streams like the layers do.

Its modelling code stays transformers' own, whose class for the whole is built without weights and without its language
model. For each call its parts are read from disk and given back: a block of the tower at a time, the rest together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.checkpoint.block import Block
from offload.checkpoint.headers import open_folder
from offload.checkpoint.layout import Checkpoint, lay_out
from offload.checkpoint.skeleton import build_tower
from offload.checkpoint.wrapped import tower_tensors
from offload.machine.out_of_memory import refusal
from offload.machine.speeds import reading_for
from offload.model.layer import Place, places
from offload.stream.store import Arena, DiskStore

LESS = "a smaller image."
LOOK = "get_image_features"


class Features(Protocol):
    """What transformers' `get_image_features` gives; rows for the language model, or what they are projected from."""

    pooler_output: Tensor | Sequence[Tensor] | None
    last_hidden_state: Tensor


@dataclass(frozen=True)
class TowerRows:
    """The rows of one image, [R, H] in the model's dtype; `deeper` are added to those after the first layers."""

    rows_RH: Tensor
    deeper: tuple[Tensor, ...] = ()


class Tower:
    """What of a checkpoint images go through, on disk until one comes."""

    def __init__(self, whole: PreTrainedModel, blocks: str, checkpoint: Checkpoint, device: torch.device) -> None:
        self._whole, self._blocks, self._checkpoint, self._device = whole, blocks, checkpoint, device
        for module in whole.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(device)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> TowerRows:
        """The rows of one image from what its processor made of it. Raises ReadFailed, NotEnoughRam, NotEnoughVram."""
        try:
            with ExitStack() as held:
                disk = held.enter_context(
                    closing(DiskStore(self._checkpoint, reading_for(next(iter(self._checkpoint.file_sizes)))))
                )
                for block in self._checkpoint.rest:
                    held.enter_context(self._present(self._whole, block, disk))
                for layer, block in zip(self._layers, self._checkpoint.layers, strict=True):
                    self._streams(layer, block, disk, held)
                look, names = self._look
                moved = {name: self._moved(inputs[name]) for name in names if name in inputs}
                found: Features = look(**moved, return_dict=True)
                rows = found.pooler_output
                if rows is None:  # Llama 4
                    rows = self._whole.get_submodule("multi_modal_projector")(found.last_hidden_state.flatten(0, -2))
                rows_RH = _joined(rows)
                if (around := getattr(found, "visual_indicator_features", None)) is not None:  # Ovis 2
                    rows_RH = self._among(rows_RH, around, inputs["input_ids"][0])
        except (MemoryError, RuntimeError) as error:
            if scarce := refusal(error, "while an image was looked at", LESS):
                raise scarce from error
            raise
        return TowerRows(rows_RH, tuple(map(_joined, getattr(found, "deepstack_features", None) or ())))

    def _among(self, rows_RH: Tensor, around_MH: Tensor, ids_L: Tensor) -> Tensor:
        """Rows of an image and those of the tokens around it, which are the same for all, as its tokens follow."""
        config = self._whole.config
        kinds = {id: kind for kind, id in enumerate((*config.visual_indicator_token_ids, config.image_token_id))}
        kinds_R = torch.tensor([kinds[id] for id in ids_L.tolist() if id in kinds], device=rows_RH.device)
        all_RH = torch.cat([around_MH, rows_RH[:1]])[kinds_R]
        all_RH[kinds_R == len(around_MH)] = rows_RH
        return all_RH

    def _moved(self, tensor: Tensor) -> Tensor:
        """Where the tower computes, and as it does; Gemma 4's brings pixels to scale before it turns them into that."""
        own = tensor.is_floating_point() and self._whole.config.model_type != "gemma4"
        return tensor.to(self._device, self._whole.dtype if own else None)

    @property
    def _look(self) -> tuple[Callable[..., Features], Sequence[str]]:
        """transformers' function that makes rows of an image, and the names of what it may take."""
        *_, look = (found for module in self._whole.modules() if (found := getattr(module, LOOK, None)))
        return look, [*inspect.signature(look).parameters, "image_sizes"]  # which Pixtral's takes with all else

    @property
    def _layers(self) -> nn.ModuleList:
        found = self._whole.get_submodule(self._blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    def _streams(self, layer: nn.Module, block: Block, disk: DiskStore, until: ExitStack) -> None:
        """From now on the layer's weights are there while it computes."""
        inside = ExitStack()
        until.enter_context(inside)
        before = layer.register_forward_pre_hook(
            lambda *_: inside.enter_context(self._present(layer, block, disk)) and None
        )
        after = layer.register_forward_hook(lambda *_: inside.close())
        until.callback(before.remove)
        until.callback(after.remove)

    @contextmanager
    def _present(self, module: nn.Module, block: Block, disk: DiskStore) -> Iterator[None]:
        """The block's tensors in the module's tables, then the placeholders again."""
        arena = Arena(block.size_B)
        disk.read_block(block, arena)
        tensors = block.dense(block.views(arena.flat), Arena(block.dense_B).flat if block.packed else None)
        known = {place.name: place for place in places(module)}
        given: list[Place] = [known[name] for name in tensors]
        try:
            for place in given:
                place.table[place.key] = tensors[place.name].to(self._device)
            yield
        finally:
            for place in given:
                place.table[place.key] = place.placeholder


def _joined(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Rows of all parts of one image, [R, H]."""
    whole = rows if isinstance(rows, Tensor) else torch.cat(list(rows))
    return whole.flatten(0, -2)


def open_tower(path: str | Path, device: str, dtype: str | torch.dtype | None = None) -> Tower:
    """The tower of a checkpoint, laid out and unread. Raises UnsupportedModel, BadModelDir."""
    folder = open_folder(Path(path))
    skeleton = build_tower(folder, dtype)
    layout = lay_out(replace(folder, entries=tower_tensors(folder.beside)), skeleton)
    return Tower(skeleton.model, skeleton.layers, layout, torch.device(device))
