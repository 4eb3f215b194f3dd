"""Tiny checkpoints that see, with a tokenizer, a template and an image processor; and what transformers makes of them.

The truth is transformers' own class for the whole: it is given the ids of the prompt and the processor's pixels.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.utils.import_utils import is_torchvision_available

from specexec.text.image_processor import needs_torchvision
from tests.recorded_images import RecordedProcessor
from tests.zoo import shrunk, tiny_of

PICTURES = 1, 2  # seeds of those that were recorded
WORD = 250  # stands for a row of an image
IDS = {
    "image_token_id": WORD, "video_token_id": 249, "boi_token_id": 248, "eoi_token_id": 247, "audio_token_id": 246,
    "vision_start_token_id": 245, "vision_end_token_id": 244,
}  # fmt: skip
SPECIAL = {
    WORD: "<|image|>", 249: "<|video|>", 248: "<|boi|>", 247: "<|eoi|>", 246: "<|audio|>", 245: "<|vision_start|>",
    244: "<|vision_end|>", 243: "[IMG_BREAK]", 242: "[IMG_END]", 241: "<|im_start|>", 240: "<|im_end|>",
    239: "]<]start of image[>[", 238: "]<]end of image[>[", 236: "<|image_start|>",
    235: "<|image_end|>", 234: "<|tile_x_separator|>", 233: "<|tile_y_separator|>", 232: "<fake_token_around_image>",
    221: "<slice>", 220: "</slice>", 219: "<image_id>", 218: "</image_id>",
    231: "<global-img>", 230: "<|image|>_", 229: "<|line|>", 228: "<row_1_col_1>", 227: "<|img_thumbnail|>",
}  # fmt: skip
# What the tokenizer of a repository calls some of them.
NAMED = {
    "image_token": SPECIAL[WORD], "boi_token": SPECIAL[248], "eoi_token": SPECIAL[247], "boa_token": SPECIAL[246],
    "eoa_token": SPECIAL[246], "start_image_token": SPECIAL[236], "end_image_token": SPECIAL[235],
    "context_image_token": SPECIAL[WORD], "video_token": SPECIAL[249], "img_line_break_token": SPECIAL[229],
    "image_break_token": SPECIAL[243], "image_end_token": SPECIAL[242], "slice_start_token": SPECIAL[221],
    "slice_end_token": SPECIAL[220], "image_id_start_token": SPECIAL[219], "image_id_end_token": SPECIAL[218],
    "image_start_token": SPECIAL[236], "image_boundary_token": SPECIAL[232],
}  # fmt: skip
UNIFIED = "gemma4_unified"  # its masks are Gemma 4's with a static cache only (transformers 5.23)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PLACE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Seeing:
    """How a tiny model of a family sees: what differs from its defaults.

    `row` and `place` are what a prompt holds for a row, and what a template writes for an image.
    """

    prepares: str
    prepared: Callable[[PreTrainedConfig], dict[str, Any]]
    settings: Callable[[PreTrainedConfig], dict[str, Any]] = lambda _: {}
    smaller: Callable[[PreTrainedConfig], None] = lambda _: None
    row: str = "<|image|>"
    place: str = "<|image|>"
    processor: str = ""
    like_films: bool = False
    """Its processor reads settings of its part for films, which that for images has as well."""


def seeing(model_type: str, folder: Path) -> PreTrainedModel:
    """A checkpoint of a family that takes images, complete; and transformers' model of it."""
    family = KNOWN[model_type]
    model = tiny_of(model_type, folder, change=partial(_smaller, family))
    write_processor(model_type, model.config, folder)
    tokenizer(SPECIAL | {WORD: family.row}).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("PLACE", family.place), encoding="utf-8")
    return model


def write_processor(model_type: str, config: PreTrainedConfig, folder: Path) -> None:
    """Its settings, as the repository of a model has them."""
    family = KNOWN[model_type]
    if replayed(model_type):
        RecordedProcessor(model_type).write(folder)
    else:
        getattr(transformers, family.prepares)(**family.prepared(config)).save_pretrained(folder)
    named = {"processor_class": family.processor or PROCESSOR_MAPPING_NAMES[model_type]}
    settings = json.dumps({**named, **family.settings(config)})
    (folder / "processor_config.json").write_text(settings, encoding="utf-8")


def config_of(model_type: str) -> PreTrainedConfig:
    """The settings of that model."""
    config = shrunk(model_type)
    _smaller(KNOWN[model_type], config)
    return config


def replayed(model_type: str) -> bool:
    """Whether pixels come from a recording, for want of torchvision."""
    return needs_torchvision(model_type) and not is_torchvision_available()


def tokenizer(special: Mapping[int, str] = SPECIAL) -> PreTrainedTokenizerFast:
    """One token for each character of ASCII, and those of images."""
    letters = {chr(code): code for code in range(128)}
    vocabulary = {f"<{id}>": id for id in range(256)} | {text: id for id, text in special.items()}
    vocabulary = {text: id for text, id in vocabulary.items() if id not in letters.values()} | letters
    taken = {id: text for text, id in vocabulary.items() if id not in special or text == special[id]}
    made = Tokenizer(models.BPE(vocab={text: id for id, text in taken.items()}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    named = {name: text for name, text in NAMED.items() if text in special.values()}
    named |= dict.fromkeys(("image_token", "context_image_token"), special[WORD])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>", extra_special_tokens=named
    )
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


def whole_processor(model_type: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """transformers' processor of the family, without its parts for films and sound."""

    def check(self: ProcessorMixin, name: str, part: object) -> None:
        assert part is None or name in ("image_processor", "tokenizer") or isinstance(part, ImageProcessingMixin)

    family = KNOWN[model_type]
    kind = _kind(family.processor or PROCESSOR_MAPPING_NAMES[model_type])
    alone: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    recorded = replayed(model_type)
    parts = {
        "image_processor": RecordedProcessor(model_type)
        if recorded
        else getattr(transformers, family.prepares).from_pretrained(folder),
        "tokenizer": tokenizer or AutoTokenizer.from_pretrained(folder),
    }
    if family.like_films:
        parts["video_processor"] = parts["image_processor"]
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    return alone.from_args_and_dict([parts.get(name) for name in alone.get_attributes()], settings)


def _kind(name: str) -> Any:
    """Pixtral's is hidden where there is no torchvision, for a function that is not called here."""
    if name != "PixtralProcessor":
        return getattr(transformers, name)
    beside = "transformers.models.pixtral.image_processing_pixtral"
    hidden: Any = ModuleType(beside)
    hidden.get_resize_output_image_size = None
    with patch.dict(sys.modules, {beside: hidden}):
        return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor


def whole_inputs(model: PreTrainedModel, folder: Path, ids: Items[int], files: Items[bytes]) -> dict[str, Any]:
    """What transformers' class for the whole is given for a prompt of these ids and image files."""
    model_type = str(model.config.model_type)
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    text = KNOWN[model_type].place * len(pictures)
    inputs = whole_processor(model_type, folder)(images=pictures, text=text, return_tensors="pt")
    is_row = (torch.tensor([ids]) == WORD).int()
    of_text = "input_ids", "attention_mask"
    given = {name: is_row if "type" in name else value for name, value in inputs.items() if name not in of_text}
    halves = {name: value.float() for name, value in given.items() if value.dtype == torch.bfloat16}
    return {"input_ids": torch.tensor([ids]), **given, **halves}


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


def _smaller(family: Seeing, config: PreTrainedConfig) -> None:
    for name, id in IDS.items():
        if hasattr(config, name):
            setattr(config, name, id)
    family.smaller(config)


def _gemma3(config: PreTrainedConfig) -> None:
    # more rows than the window of the text
    config.mm_tokens_per_image, config.vision_config.image_size = 16, 8 * config.vision_config.patch_size


def _gemma4(config: PreTrainedConfig) -> None:
    config.get_text_config().use_bidirectional_attention = "vision"


def _unified(config: PreTrainedConfig) -> None:
    config.vision_config = transformers.Gemma4UnifiedVisionConfig(
        mm_embed_dim=64, mm_posemb_size=32, output_proj_dims=64, pooling_kernel_size=1
    )
    _gemma4(config)


def _llama4(config: PreTrainedConfig) -> None:
    vision = config.vision_config
    vision.image_size, vision.intermediate_size = 4 * vision.patch_size, 4 * vision.hidden_size


def _mistral3(config: PreTrainedConfig) -> None:
    config.vision_config.image_size = 112


def _kimi(config: PreTrainedConfig) -> None:
    config.projection_hidden_size = config.vision_config.hidden_size


def _qwen2_5(config: PreTrainedConfig) -> None:
    config.vision_config.window_size = 112


def _pinned(config: PreTrainedConfig) -> None:
    config.image_grid_pinpoints = PINPOINTS


def _tiles(config: PreTrainedConfig) -> None:
    """Two patches of a tower make a row in height and in width."""
    vision = config.vision_config
    vision.image_size, vision.patch_size = 28, 7


def _perceiver(config: PreTrainedConfig) -> None:
    config.vision_config.image_size, config.vision_config.patch_size = 56, 14
    for name, value in {"n_latents": 4, "depth": 1, "n_heads": 4, "head_dim": 16}.items():
        setattr(config.perceiver_config, f"resampler_{name}", value)
    config.perceiver_config.hidden_size, config.perceiver_config.num_key_value_heads = 64, 2


def _ovis(config: PreTrainedConfig) -> None:
    config.visual_indicator_token_ids = [226, 225, 224, 223, 222]
    config.vision_config.vocab_size = 32
    config.vision_config.image_size, config.vision_config.patch_size = 28, 14


def _eights(config: PreTrainedConfig) -> None:
    config.vision_config.patch_size = 8


def _intern(config: PreTrainedConfig) -> None:
    config.vision_config.image_size, config.vision_config.patch_size = [28, 28], [7, 7]


def _ocr(config: PreTrainedConfig) -> None:
    """Its processor writes 256 rows for a tile of any size."""
    vision = config.vision_config
    vision.image_size, vision.patch_size, vision.mlp_dim = 256, 4, 128
    vision.global_attn_indexes, vision.output_channels = (), 16
    config.get_text_config().max_position_embeddings = 1024


def _sam(config: PreTrainedConfig) -> None:
    _tiles(config)
    vision = config.high_res_vision_config
    vision.image_size, vision.output_channels, vision.mlp_dim, vision.global_attn_indexes = 64, 16, 128, [1]


def _vip(config: PreTrainedConfig) -> None:
    config.vision_feature_layers = [-1, -2]


def _aria(config: PreTrainedConfig) -> None:
    """Its processor makes images of 980 by 980 pixels, or of a quarter."""
    config.vision_config.image_size, config.vision_config.patch_size = 980, 140
    config.projector_patch_to_query_dict = {49: 256}
    config.get_text_config().max_position_embeddings = 1024


def _slices(config: PreTrainedConfig) -> None:
    """16 patches in two merges, the first of them after the first layer, or 4 in one, make a row."""
    vision = config.vision_config
    config.insert_layer_id = vision.insert_layer_id = 1
    vision.image_size, vision.patch_size = 32, 4


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _qwen_pixels(config: PreTrainedConfig) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
    }


def _gemma4_pixels(config: PreTrainedConfig) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size, "max_soft_tokens": 70
    }  # fmt: skip


def _kimi_pixels(config: PreTrainedConfig) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_kernel_size[0],
        "size": {"max_height": 8, "max_width": 8},
    }


def _pixtral_settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "patch_size": config.vision_config.patch_size, "spatial_merge_size": config.spatial_merge_size,
        "image_token": "<|image|>",
    }  # fmt: skip


def _pixtral_pixels(config: PreTrainedConfig) -> dict[str, Any]:
    return {"size": {"longest_edge": 112}, "patch_size": config.vision_config.patch_size}


PINPOINTS = [[28, 56], [56, 28], [56, 56]]
VISION = "<|vision_start|><|image|><|vision_end|>"
_CLIP = lambda _: {"size": {"shortest_edge": 28}, "crop_size": _square(28)}  # noqa: E731
_CLIP_TEXT = lambda _: {  # noqa: E731
    "patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"
}  # fmt: skip
_GLM = Seeing("Glm4vImageProcessorPil", _qwen_pixels, place=VISION)
_QWEN = Seeing("Qwen2VLImageProcessorPil", _qwen_pixels, place=VISION)
_IDEFICS = Seeing(
    "Idefics3ImageProcessorPil",
    lambda _: {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
    lambda _: {"image_seq_len": 4},
    _tiles,
    row="<image>",
    place="<image>",
)
_TILED = Seeing(
    "GotOcr2ImageProcessorPil", lambda _: {"size": _square(28), "max_patches": 4}, lambda _: {"image_seq_length": 4}
)
_SLICED = Seeing(
    "MiniCPMV4_6ImageProcessorPil",
    lambda config: {
        "patch_size": 4, "scale_resolution": 32, "max_slice_nums": 4, "downsample_mode": config.downsample_mode
    },
    smaller=_slices,
    like_films=True,
)  # fmt: skip
KNOWN = {
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
    "qwen2_5_vl": replace(_QWEN, smaller=_qwen2_5),
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": replace(_GLM, prepares="Glm46VImageProcessorPil"),
    "glm_ocr": replace(_GLM, prepares="Glm46VImageProcessorPil", processor="Glm46VProcessor"),
    "glmga": replace(_GLM, prepares="GlmgaImageProcessorPil", processor="Glm46VProcessor"),
    "hunyuan_vl": Seeing(
        "HunYuanVLImageProcessorPil", _qwen_pixels, place=f"{SPECIAL[236]}{SPECIAL[WORD]}{SPECIAL[242]}"
    ),
    "exaone4_5": replace(_QWEN, smaller=_qwen2_5),
    "lfm3_vl": _QWEN,
    "hyperclovax_vision_v2": replace(_QWEN, smaller=_qwen2_5),
    "video_llama_3": Seeing(
        "VideoLlama3ImageProcessorPil",
        lambda config: {
            "patch_size": config.vision_config.patch_size,
            "size": {"shortest_edge": 1024, "longest_edge": 4096},
        },
    ),
    "aria": Seeing("AriaImageProcessorPil", lambda _: {}, smaller=_aria),
    "vipllava": Seeing("CLIPImageProcessorPil", _CLIP, _CLIP_TEXT, _vip),
    "gemma3": Seeing(
        "Gemma3ImageProcessorPil",
        lambda config: {"size": _square(config.vision_config.image_size)},
        lambda config: {"image_seq_length": config.mm_tokens_per_image},
        _gemma3,
        place="<|boi|>",
    ),
    "gemma4": Seeing("Gemma4ImageProcessorPil", _gemma4_pixels, smaller=_gemma4),
    "mistral3": Seeing("PixtralImageProcessorPil", _pixtral_pixels, _pixtral_settings, _mistral3),
    "lighton_ocr": Seeing(
        "PixtralImageProcessorPil",
        lambda config: {**_pixtral_pixels(config), "patch_size": config.vision_config.patch_size * 2},
        _pixtral_settings,
        _mistral3,
    ),
    UNIFIED: Seeing("Gemma4UnifiedImageProcessor", _gemma4_pixels, smaller=_unified),
    "llama4": Seeing(
        "Llama4ImageProcessor",
        lambda config: {"size": _square(config.vision_config.image_size), "max_patches": 4},
        lambda config: {
            "patch_size": config.vision_config.patch_size,
            "pixel_shuffle_ratio": config.vision_config.pixel_shuffle_ratio,
        },
        _llama4,
        row="<|patch|>",
    ),
    "kimi_k25": Seeing("Kimi_K25ImageProcessor", _kimi_pixels, smaller=_kimi),
    "minimax_m3_vl": Seeing("MiniMaxM3VLImageProcessor", _qwen_pixels, row="]<]image[>[", place="]<]image[>["),
    "llava": Seeing("LlavaImageProcessorPil", _CLIP, _CLIP_TEXT),
    "llava_next": Seeing(
        "LlavaNextImageProcessorPil", lambda _: {**_CLIP(_), "image_grid_pinpoints": PINPOINTS}, _CLIP_TEXT, _pinned
    ),
    "llava_next_video": Seeing(
        "LlavaNextImageProcessorPil", lambda _: {**_CLIP(_), "image_grid_pinpoints": PINPOINTS}, _CLIP_TEXT, _pinned
    ),
    "llava_onevision": Seeing(
        "LlavaOnevisionImageProcessorPil",
        lambda _: {"size": _square(28), "image_grid_pinpoints": PINPOINTS},
        lambda _: {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        _pinned,
    ),
    "idefics2": Seeing(
        "Idefics2ImageProcessorPil",
        lambda _: {"size": {"longest_edge": 56, "shortest_edge": 28}, "do_image_splitting": True},
        lambda _: {"image_seq_len": 4},
        _perceiver,
        row="<image>",
        place="<image>",
    ),
    "idefics3": _IDEFICS,
    "smolvlm": replace(_IDEFICS, prepares="SmolVLMImageProcessorPil", processor="Idefics3Processor"),
    "internvl": replace(_TILED, smaller=_intern),
    "aya_vision": replace(
        _TILED,
        settings=lambda _: {
            "img_size": 28,
            "patch_size": 7,
            "downsample_factor": 2,
            "img_patch_token": "<|image|>",
            "image_token": "<image>",
        },
        smaller=_tiles,
        place="<image>",
    ),
    "cohere2_vision": Seeing(
        "Cohere2VisionImageProcessor",
        lambda _: {"size": _square(28), "max_patches": 4, "patch_size": 2},
        smaller=_tiles,
    ),
    "lfm2_vl": Seeing(
        "Lfm2VlImageProcessor",
        lambda _: {
            "size": _square(32),
            "tile_size": 32,
            "encoder_patch_size": 8,
            "max_tiles": 4,
            "min_image_tokens": 2,
            "max_image_tokens": 4,
        },
        smaller=_eights,
    ),
    "minicpmv4_6": _SLICED,
    "ovis2": Seeing(
        "Ovis2ImageProcessorPil",
        lambda _: {"size": _square(28), "crop_to_patches": True, "max_patches": 4},
        lambda _: {"image_seq_length": 4},
        _ovis,
        row="<IMG_ATOM>",
        place="<image>",
    ),
    "got_ocr2": replace(
        _TILED,
        settings=lambda _: {},
        prepared=lambda _: {"size": _square(256)},
        smaller=_ocr,
        row="<imgpad>",
        place="<imgpad>",
    ),
    "deepseek_vl": Seeing(
        "DeepseekVLImageProcessorPil", lambda _: {"size": _square(28)}, lambda _: {"num_image_tokens": 16}, _tiles
    ),
    "deepseek_vl_hybrid": Seeing(
        "DeepseekVLHybridImageProcessorPil",
        lambda _: {"size": _square(28), "high_res_size": _square(64)},
        lambda _: {"num_image_tokens": 16},
        _sam,
    ),
}
