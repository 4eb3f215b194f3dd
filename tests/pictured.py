"""Tiny checkpoints that see, with a tokenizer, a template and an image processor; and what transformers makes of them.

The truth is transformers' own class for the whole: it is given the ids of the prompt and the processor's pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from specexec.text.image_prompts import FAMILIES
from tests.zoo import tiny_of

WORD = 250  # stands for a row of an image
IDS = {
    "image_token_id": WORD, "video_token_id": 249, "boi_token_id": 248, "eoi_token_id": 247, "audio_token_id": 246,
    "vision_start_token_id": 245, "vision_end_token_id": 244,
}  # fmt: skip
SPECIAL = {
    WORD: "<|image|>", 249: "<|video|>", 248: "<|boi|>", 247: "<|eoi|>", 246: "<|audio|>", 245: "<|vision_start|>",
    244: "<|vision_end|>", 243: "[IMG_BREAK]", 242: "[IMG_END]", 241: "<|im_start|>", 240: "<|im_end|>",
    239: "]<]start of image[>[", 238: "]<]end of image[>[", 236: "<|image_start|>",
    235: "<|image_end|>", 234: "<|tile_x_separator|>", 233: "<|tile_y_separator|>",
}  # fmt: skip
TILED = SPECIAL | {WORD: "<|patch|>", 237: "<|image|>"}  # Llama 4, where another token stands for all of an image
UNIFIED = "gemma4_unified"  # its masks are Gemma 4's with a static cache only (transformers 5.23)
PLACES = {
    "gemma3": "<|boi|>",
    "gemma4": "<|image|>",
    UNIFIED: "<|image|>",
    "llama4": "<|image|>",
    "minimax_m3_vl": "<|image|>",
    "mistral3": "<|image|>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PLACE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def seeing(model_type: str, folder: Path) -> PreTrainedModel:
    """A checkpoint of a family that takes images, complete; and transformers' model of it."""
    model = tiny_of(model_type, folder, change=_smaller)
    _processor(model_type, model.config).save_pretrained(folder)
    tokenizer(TILED if model_type == "llama4" else SPECIAL).save_pretrained(folder)
    place = PLACES.get(model_type, "<|vision_start|><|image|><|vision_end|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("PLACE", place), encoding="utf-8")
    return model


def tokenizer(special: Mapping[int, str] = SPECIAL) -> PreTrainedTokenizerFast:
    """One token for each character of ASCII, and those of images."""
    letters = {chr(code): code for code in range(128)}
    vocabulary = {f"<{id}>": id for id in range(256)} | {text: id for id, text in special.items()}
    vocabulary = {text: id for text, id in vocabulary.items() if id not in letters.values()} | letters
    taken = {id: text for text, id in vocabulary.items() if id not in special or text == special[id]}
    made = Tokenizer(models.BPE(vocab={text: id for id, text in taken.items()}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": [*special.values()]})
    return fast


def picture(seed: int, width: int = 90, height: int = 70) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shown(*content: bytes | str) -> dict[str, object]:
    """A message of a user, images and text."""
    parts: list[dict[str, object]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            url = f"data:image/png;base64,{base64.b64encode(part).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}


def whole_inputs(model: PreTrainedModel, folder: Path, ids: Items[int], files: Items[bytes]) -> dict[str, Any]:
    """What transformers' class for the whole is given for a prompt of these ids and image files."""
    model_type = str(model.config.model_type)
    options = {"patch_size": model.config.vision_config.patch_size * 2} if model_type == "mistral3" else {}
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend=FAMILIES[model_type].backend)
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    inputs: Mapping[str, Any] = processor(images=pictures, return_tensors="pt", **options)
    is_row = (torch.tensor([ids]) == WORD).int()
    plain = dict.fromkeys(("mistral3", "kimi_k25", "minimax_m3_vl", "llama4"), "")
    of_rows = {"gemma3": "token_type_ids"} | plain
    kinds = {name: is_row} if (name := of_rows.get(model_type, "mm_token_type_ids")) else {}
    unused = ("num_crops", "aspect_ratios", "num_soft_tokens_per_image")
    used = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in inputs.items() if k not in unused}
    return {"input_ids": torch.tensor([ids]), **used, **kinds}


def logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Of every token of a prompt, [L, V]."""
    ids = inputs["input_ids"]
    masks: dict[str, Any] = {}
    if model.config.model_type == UNIFIED:
        masks["attention_mask"] = model.create_masks_for_generate(  # type: ignore[operator]
            model.config,
            torch.empty(*ids.shape, 1),
            torch.ones_like(ids),
            None,
            torch.arange(ids.shape[1])[None],
            inputs["mm_token_type_ids"],
        )
    with torch.no_grad():
        found: torch.Tensor = model(**{**inputs, **masks}, use_cache=False).logits[0]
    return found


def written(model: PreTrainedModel, inputs: Mapping[str, Any], count: int) -> list[int]:
    """The greedy answer of transformers' own generate."""
    prompt = inputs["input_ids"].shape[1]
    masks = {"cache_implementation": "static", "disable_compile": True}
    how = masks if model.config.model_type == UNIFIED else {}
    found = model.generate(  # type: ignore[operator]
        **inputs, **how, max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    answer: list[int] = found[0, prompt:].tolist()
    return answer


def _smaller(config: PreTrainedConfig) -> None:
    for name, id in IDS.items():
        if hasattr(config, name):
            setattr(config, name, id)
    if config.model_type == UNIFIED:
        config.vision_config = transformers.Gemma4UnifiedVisionConfig(
            mm_embed_dim=64, mm_posemb_size=32, output_proj_dims=64
        )
        config.get_text_config().use_bidirectional_attention = "vision"
    vision = config.vision_config
    if config.model_type == "gemma3":
        # more rows than the window of the text
        config.mm_tokens_per_image, vision.image_size = 16, 8 * vision.patch_size
    if config.model_type == "gemma4":
        config.get_text_config().use_bidirectional_attention = "vision"
    if config.model_type == "mistral3":
        vision.image_size = 112
    if config.model_type == "llama4":
        vision.image_size, vision.intermediate_size = 4 * vision.patch_size, 4 * vision.hidden_size
    if config.model_type == "kimi_k25":
        config.projection_hidden_size = vision.hidden_size
    if config.model_type == "qwen2_5_vl":
        vision.window_size = 112


def _processor(model_type: str, config: PreTrainedConfig) -> Any:
    vision = config.vision_config
    if model_type == "gemma3":
        return transformers.Gemma3ImageProcessorPil(size={"height": vision.image_size, "width": vision.image_size})
    if model_type == "gemma4":
        kernel = vision.pooling_kernel_size
        return transformers.Gemma4ImageProcessorPil(
            patch_size=vision.patch_size, pooling_kernel_size=kernel, max_soft_tokens=70
        )
    if model_type == "mistral3":
        return transformers.PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size=vision.patch_size)
    if model_type == UNIFIED:
        kernel = vision.pooling_kernel_size
        return transformers.Gemma4UnifiedImageProcessor(
            patch_size=vision.patch_size, pooling_kernel_size=kernel, max_soft_tokens=70
        )
    if model_type == "llama4":
        side = vision.image_size
        return transformers.Llama4ImageProcessor(size={"height": side, "width": side}, max_patches=4)
    if model_type == "kimi_k25":
        return transformers.Kimi_K25ImageProcessor(
            patch_size=vision.patch_size, merge_size=vision.merge_kernel_size[0], size={"max_height": 8, "max_width": 8}
        )
    kinds = {
        "minimax_m3_vl": "MiniMaxM3VLImageProcessor",
        "glm4v": "Glm4vImageProcessorPil",
        "glm4v_moe": "Glm4vImageProcessorPil",
        "glm46v": "Glm46VImageProcessorPil",
    }
    return getattr(transformers, kinds.get(model_type, "Qwen2VLImageProcessorPil"))(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
    )
