"""What is known of a model that need not be loaded: its tokenizer, and how long its texts may be."""

from __future__ import annotations

from pathlib import Path

import offload as weights
from specexec.architecture import longest_text
from specexec.encoding import Encoding
from specexec.errors import ContextLengthExceeded

DEFAULT_CONTEXT = 8192


def encoding_of(model: str, *, offline: bool = False, trust_remote_code: bool = False) -> Encoding:
    """The tokenizer of a model that need not be loaded."""
    folder = weights.resolve(model, offline=offline, code=trust_remote_code).target
    return encoding_in(folder, trust_remote_code)


def encoding_in(folder: Path, trust_remote_code: bool = False) -> Encoding:
    """The tokenizer of a model folder. Raises RemoteCode where it needs code that is not trusted."""
    with weights.running_code(folder, trust_remote_code):
        return Encoding.of(folder, trust_remote_code)


def context_of(folder: Path, ctx: int | None, trust_remote_code: bool = False) -> int:
    """Tokens that prompt and answer may have together, as `load` decides it, at most what the model was made for."""
    config = weights.design(weights.open_folder(folder), trust_remote_code).config
    return min(ctx or DEFAULT_CONTEXT, longest_text(config))


def context_for(asked: int | None, longest: int) -> int:
    if asked is not None and asked > longest:
        raise ContextLengthExceeded(f"--ctx {asked:,} is more than the {longest:,} tokens the model was made for.")
    return asked or min(DEFAULT_CONTEXT, longest)
