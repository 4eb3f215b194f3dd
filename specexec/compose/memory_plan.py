"""How a target shall be placed, and the memory that goes to guesses beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import offload as weights
from specexec.drafters.few_bits import Form
from specexec.drafters.registry import Choice
from specexec.drafters.skip import SHARE
from specexec.sizes import Widths, drafting_B, guesses_B, widths_of, workspace


@dataclass(frozen=True)
class Asked:
    """How the target shall be placed."""

    offload: weights.Offload
    device: str
    dtype: torch.dtype | None
    context: int
    nodes: int
    branches: bool
    draft_vocab: int
    drafter_quant: weights.FewBits
    head_quant: weights.FourBits

    def guesses_B(self, choice: Choice, pair: weights.ModelPair) -> int:
        """Keys and values beyond those of the text."""
        return guesses_B(
            self.widths(weights.open_folder(pair.target)), self.context, self.nodes if choice.sources else 0
        )

    def item_B(self, folder: weights.Folder) -> int:
        return self.dtype.itemsize if self.dtype else weights.item_B(folder)

    def widths(self, folder: weights.Folder) -> Widths:
        item_B = self.item_B(folder)
        return widths_of(folder.config, item_B, weights.cache_B(folder.config, 1, item_B))

    def bits(self, folder: weights.Folder) -> weights.FewBits:
        """What the layers of a drafter model become: one that is quantised already stays as it is."""
        return "none" if weights.is_quantised(folder) else self.drafter_quant

    @property
    def copy(self) -> Form:
        """What `substitute` makes of the target's layers."""
        return "nf4" if self.drafter_quant == "none" else self.drafter_quant


def beside_B(choice: Choice, pair: weights.ModelPair, asked: Asked) -> dict[str, int]:
    """Memory beside the target and its text. Skipping in a resident one is free, but it is not placed yet."""
    target = weights.open_folder(pair.target)
    needed = workspace(asked.widths(target), asked.context, asked.nodes if choice.sources else 0)
    drafter_B = int(SHARE * sum(target.file_sizes.values())) if "skip" in choice.sources else 0
    if "substitute" in choice.sources:
        drafter_B += sum(weights.copy_B(target, asked.copy, asked.item_B(target)))  # quantised layer by layer
    for drafter in drafters_of(choice, pair, asked):
        drafter_B += drafter.token_B * asked.context + drafting_B(drafter, asked.context, asked.nodes)
    for folder in _models(choice, pair):
        drafter_B += weights.resident_B(folder, asked.bits(folder), asked.item_B(folder), 0)
        drafter_B -= weights.looked_up_B(folder, asked.bits(folder), asked.item_B(folder))
        drafter_B += 3 * asked.draft_vocab // 2 * asked.widths(folder).hidden * asked.item_B(folder)
    return {**needed, "drafter": drafter_B}


def beside_ram_B(choice: Choice, pair: weights.ModelPair, asked: Asked) -> dict[str, int]:
    """What of it lies in RAM even beside a GPU: a drafter's token ids are looked up as the target's are."""
    if not choice.models:
        return {}
    embeddings_B = [
        weights.looked_up_B(folder, asked.bits(folder), asked.item_B(folder)) for folder in _models(choice, pair)
    ]
    return {"embeddings of the drafter": sum(embeddings_B)}


def drafters_of(choice: Choice, pair: weights.ModelPair, asked: Asked) -> list[Widths]:
    """Models that draft, with keys and values of their own."""
    target = asked.widths(weights.open_folder(pair.target))
    copies = [target for source in choice.sources if source in ("skip", "substitute")]
    return [*map(asked.widths, _models(choice, pair)), *copies]


def _models(choice: Choice, pair: weights.ModelPair) -> list[weights.Folder]:
    return [weights.open_folder(path) for path in pair.drafters] if choice.models else []
