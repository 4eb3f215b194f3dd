"""Tiny checkpoints that see, with the tokenizer, the chat template and the vocabulary of a published model.

Everything about a prompt is real: which tokens stand for images, what a template writes around them, how many rows the
vocabulary is padded to. The truth is transformers' processor, its chat template included, and generate of the whole.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel

from tests import real
from tests.pictured import KNOWN, whole_processor, write_processor
from tests.writer import ROWS
from tests.zoo import tiny_of


@dataclass(frozen=True)
class Published:
    """What is taken from published models.

    `ids` are tokens by the settings of a config that name them; `processor` is the class that prepares pixels, as the
    repository calls it. `renamed` are tokens by their ids that this model has and the one whose tokenizer it is not.
    """

    tokenizer: str
    ids: Mapping[str, str]
    processor: str
    template: str = ""
    """One of `real.templates()`; the tokenizer's own where it is empty."""
    renamed: Mapping[int, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    """What tokenizer_config.json calls some of them, beside what is there."""


_QWEN = Published(
    "qwen3",
    {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "Qwen2VLImageProcessorFast",
    "llama_cpp/Qwen3.5-4B",
)
PUBLISHED = {
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen2_5_vl": replace(_QWEN, processor="Qwen2VLImageProcessor", template="vllm/dse_qwen2_vl"),
    "gemma3": Published(
        "gemma3",
        {
            "image_token_id": "<image_soft_token>",
            "boi_token_id": "<start_of_image>",
            "eoi_token_id": "<end_of_image>",
        },
        "Gemma3ImageProcessor",
    ),
    # Its vocabulary is Gemma 3's, with other control tokens.
    "gemma4": Published(
        "gemma3",
        {
            "image_token_id": "<|image|>",
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "audio_token_id": "<|audio|>",
        },
        "Gemma4ImageProcessor",
        "llama_cpp/google-gemma-4-31B-it",
        {
            105: "<|turn>", 106: "<turn|>", 255_999: "<|image>", 256_000: "<|audio>", 258_880: "<|image|>",
            258_881: "<|audio|>", 258_882: "<image|>", 258_883: "<audio|>", 258_884: "<|video|>",
        },
        {
            "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "eos_token": "<turn|>",
            "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
        },
    ),
    # Its vocabulary is Mistral Nemo's, with three control tokens more.
    "mistral3": Published(
        "mistral_nemo",
        {"image_token_id": "[IMG]"},
        "PixtralImageProcessorFast",
        "llama_cpp/Mistral-Small-3.2-24B-Instruct-2506",
        {10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]", 13: "[IMG_END]"},
    ),
}  # fmt: skip


def really_seeing(model_type: str, folder: Path) -> PreTrainedModel:
    """A checkpoint in `folder`, and transformers' model of it."""
    published, family = PUBLISHED[model_type], KNOWN[model_type]
    ids = _write_tokenizer(published, folder)

    def change(config: PreTrainedConfig) -> None:
        text = config.get_text_config()
        text.max_position_embeddings = 2048  # some templates have long prompts of their own
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if hasattr(text, name):
                setattr(text, name, ROWS[published.tokenizer])
        family.smaller(config)
        for setting, token in published.ids.items():
            setattr(config, setting, ids[token])

    model = tiny_of(model_type, folder, change=change)
    write_processor(model_type, model.config, folder)
    _change(folder / "preprocessor_config.json", {"image_processor_type": published.processor})
    if model_type == "mistral3":
        _change(folder / "processor_config.json", {"image_token": "[IMG]"})
    if published.template:
        (folder / "chat_template.jinja").write_text(real.templates()[published.template], encoding="utf-8")
    return model


def processor_of(model_type: str, folder: Path) -> Any:
    """transformers' processor of the folder, with its chat template."""
    published = PUBLISHED[model_type]
    made = whole_processor(model_type, folder, None if published.renamed else real.pretrained(published.tokenizer))
    file = folder / "chat_template.jinja"
    made.chat_template = file.read_text(encoding="utf-8") if file.exists() else made.tokenizer.chat_template
    return made


def inputs_of(processor: Any, messages: Items[Mapping[str, Any]]) -> dict[str, Any]:
    """What transformers makes of messages for the whole model; bytes among their content are image files."""
    theirs = [{**message, "content": [_part(part) for part in message["content"]]} for message in messages]
    made = processor.apply_chat_template(
        theirs, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    return dict(made)


def _part(part: bytes | str) -> dict[str, object]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": Image.open(io.BytesIO(part))}


def _write_tokenizer(published: Published, folder: Path) -> dict[str, int]:
    """The files of a tokenizer; the ids of its control tokens."""
    source = real.tokenizer(published.tokenizer)
    if not published.renamed:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, folder / file)
        return real.pretrained(published.tokenizer).get_added_vocab()
    told = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    before = {token["id"]: token for token in told["added_tokens"]}
    vocabulary = told["model"]["vocab"]
    for id, text in published.renamed.items():
        found = before.get(id)
        old = next(old for old, at in vocabulary.items() if at == id) if found is None else found["content"]
        del vocabulary[old]
        vocabulary[text] = id
        before[id] = {
            "id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True,
        }  # fmt: skip
    told["added_tokens"] = [before[id] for id in sorted(before)]
    (folder / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("added_tokens_decoder", None)
    if published.named:
        settings |= {**published.named, "extra_special_tokens": dict(published.named)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return {token["content"]: token["id"] for token in told["added_tokens"]}


def _change(file: Path, more: Mapping[str, object]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **more}), encoding="utf-8")
