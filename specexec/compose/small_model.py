"""A small model and its tokenizer out of a folder, to be trained: dense, in float32, with the tokens of its target."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import offload as weights
from specexec.compose.context import encoding_in
from specexec.distill.divergence import Loss
from specexec.distill.record import tokens_named
from specexec.distill.recording import RecordedTarget
from specexec.distill.small_model import SmallModel
from specexec.errors import BadDrafter, TokenizerMismatch


def opened(folder: Path, target: RecordedTarget, loss: Loss) -> tuple[SmallModel, PreTrainedTokenizerBase]:
    """Both. Raises BadDrafter for quantised weights, other layouts and what transformers does not know, and
    TokenizerMismatch for other tokens."""
    held = weights.open_folder(folder)
    try:
        weights.design(held)
    except weights.OffloadError as refusal:
        raise BadDrafter(refusal.what, refusal.why, "a small model of a kind that transformers knows.") from refusal
    if held.weights_at.parent != folder:
        raise BadDrafter(
            f"the weights of {held.called} are in a layout of other programs, and training needs a folder of "
            "transformers.",
            hint="the model as it was published for transformers, with config.json and model*.safetensors.",
        )
    if weights.is_quantised(held):
        raise BadDrafter(
            f"the weights of {folder} are quantised, and training needs dense ones.",
            hint="the model as it was published, in 16 bits or more.",
        )
    tokenizer = encoding_in(folder).tokenizer
    if tokens_named(tokenizer.get_vocab()) != target.tokens:
        raise TokenizerMismatch(
            f"{folder} has other tokens than {target.name}: a model learns from texts in its own tokens.",
            hint="a small model of the same family, or specexec distill head, which needs none.",
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, trust_remote_code=False)
    published = model.dtype
    model = model.float()
    model.config.dtype = published
    return SmallModel.of(model, target, loss), tokenizer
