"""How a target shall be placed, and the memory that goes to guesses beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import offload as weights
from specexec.drafters.choice import Choice
from specexec.drafters.skip import SHARE
from specexec.workspace import Widths, drafting_B, guesses_B, widths_of, workspace


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
    drafter_quant: weights.FourBits
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


def beside_B(choice: Choice, pair: weights.ModelPair, asked: Asked) -> dict[str, int]:
    """Memory beside the target and its text. Skipping in a resident one is free, but it is not placed yet."""
    target = weights.open_folder(pair.target)
    needed = workspace(asked.widths(target), asked.context, asked.nodes if choice.sources else 0)
    drafter_B = int(SHARE * sum(target.file_sizes.values())) if "skip" in choice.sources else 0
    if "substitute" in choice.sources:
        drafter_B += sum(weights.four_bit_copy_B(target, asked.item_B(target)))  # quantised layer by layer
    for drafter in drafters_of(choice, pair, asked):
        drafter_B += drafter.token_B * asked.context + drafting_B(drafter, asked.context, asked.nodes)
    if "sibling" in choice.sources and pair.drafter is not None:
        folder = weights.open_folder(pair.drafter)
        drafter_B += weights.resident_B(folder, asked.drafter_quant, asked.item_B(folder), 0)
        drafter_B -= weights.looked_up_B(folder, asked.drafter_quant, asked.item_B(folder))
        drafter_B += 3 * asked.draft_vocab // 2 * asked.widths(folder).hidden * asked.item_B(folder)
    return {**needed, "drafter": drafter_B}


def beside_ram_B(choice: Choice, pair: weights.ModelPair, asked: Asked) -> dict[str, int]:
    """What of it lies in RAM even beside a GPU: a drafter's token ids are looked up as the target's are."""
    if "sibling" not in choice.sources or pair.drafter is None:
        return {}
    folder = weights.open_folder(pair.drafter)
    return {"embeddings of the drafter": weights.looked_up_B(folder, asked.drafter_quant, asked.item_B(folder))}


def drafters_of(choice: Choice, pair: weights.ModelPair, asked: Asked) -> list[Widths]:
    """Models that draft, with keys and values of their own."""
    target = asked.widths(weights.open_folder(pair.target))
    found = {"skip": target, "substitute": target}
    if pair.drafter is not None:
        found["sibling"] = asked.widths(weights.open_folder(pair.drafter))
    return [found[source] for source in choice.sources if source in found]
