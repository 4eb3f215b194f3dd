"""Text between two texts, by models that were trained to fill it in (Bavarian et al. 2022, arXiv 2207.14255).

A prompt is the text before, the text after, and a mark where the answer begins; which marks, only the vocabulary says.
Before it may stand other texts, such as files of the same project, as llama.cpp's server has them.
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

# The marks before a project's name and before the name of each of its files.
_FILES = (
    ("<|repo_name|>", "<|file_sep|>"),  # Qwen2.5-Coder and later
    ("<repo_name>", "<file_sep>"),  # StarCoder 2
    ("<reponame>", "<filename>"),  # StarCoder, Granite Code
)
PROJECT, FILE = "myproject\n", "filename\n"  # what stands for names that no request gives
BETWEEN = "\n\n--- snippet ---\n\n"  # before each text where there are no marks for files


@dataclass(frozen=True)
class InfillMarks:
    """The ids of one vocabulary's marks; those of projects and files may be missing."""

    before: int
    after: int
    answer: int
    files: tuple[int, int] | None = None


@dataclass(frozen=True)
class OtherText:
    """A text that helps to fill in another one."""

    name: str
    text: str


def infill_marks(vocabulary: Mapping[str, int]) -> InfillMarks | None:
    """The marks of the first family whose vocabulary this is; None where text cannot be filled in."""
    found = next((names for names in _FAMILIES if all(name in vocabulary for name in names)), None)
    if found is None:
        return None
    files = next((names for names in _FILES if all(name in vocabulary for name in names)), None)
    before, after, answer = (vocabulary[name] for name in found)
    return InfillMarks(before, after, answer, None if files is None else (vocabulary[files[0]], vocabulary[files[1]]))
