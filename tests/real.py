"""The real model, tokenizers and templates (scripts/real_material.py); tests are skipped where they cannot be had."""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specexec.text.tokenizer import Encoding

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import real_material as real_material  # for tests.writer

TOKENIZERS = real_material.TOKENIZERS


def model() -> Path:
    """SmolLM2-135M-Instruct as a safetensors checkpoint in bfloat16."""
    return _or_skip(real_material.model)


def gguf() -> Path:
    """SmolLM2-135M-Instruct as it is published: a GGUF file in Q4_1."""
    return _or_skip(real_material.gguf)


def tokenizer(name: str) -> Path:
    """The folder of one of TOKENIZERS."""
    return _or_skip(lambda: real_material.tokenizer(name))


@cache
def pretrained(name: str) -> PreTrainedTokenizerBase:
    """One of TOKENIZERS as transformers loads it, once for all tests: they change nothing of it."""
    return AutoTokenizer.from_pretrained(tokenizer(name))


@cache
def encoding(name: str) -> Encoding:
    """One of TOKENIZERS, loaded once for all tests."""
    return Encoding.of(tokenizer(name))


def templates() -> dict[str, str]:
    """Every chat template, by `engine/file name`."""
    folder = _or_skip(real_material.templates)
    return {
        f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8") for path in sorted(folder.glob("*/*.jinja"))
    }


def _or_skip(make: Callable[[], Path]) -> Path:
    try:
        return make()
    except real_material.Unreachable as problem:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"real material cannot be had: {problem}")
