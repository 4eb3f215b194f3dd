"""Text between two texts, by models that were trained to fill it in (Bavarian et al. 2022, arXiv 2207.14255).

A prompt is the text before, the text after, and a mark where the answer begins; which marks, only the vocabulary says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The marks before the text before, before the text after, and before the answer, by the families that have them.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5 and later, CodeGemma, Granite 3.3
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


@dataclass(frozen=True)
class InfillMarks:
    """The ids of one vocabulary's marks."""

    before: int
    after: int
    answer: int


def infill_marks(vocabulary: Mapping[str, int]) -> InfillMarks | None:
    """The marks of the first family whose vocabulary this is; None where text cannot be filled in."""
    found = next((names for names in _FAMILIES if all(name in vocabulary for name in names)), None)
    return None if found is None else InfillMarks(*(vocabulary[name] for name in found))
