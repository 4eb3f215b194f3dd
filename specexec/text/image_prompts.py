"""Images in prompts: what a family's chat template writes for one becomes the tokens of its rows."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt, prod, sqrt
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from specexec.errors import BadMessages
from specexec.model.image_rows import Image, Images, Sight, number_of
from specexec.sizes import IMAGE_ROWS, SEEING
from specexec.text.image_processor import ImageProcessor, PreparedImage
from specexec.text.pictures import pixels

MOST_IMAGES = 32  # in one prompt
RECENT = 2 * MOST_IMAGES
SHRINK = 0.95  # of the sides that would just do
TRIES = 8

Grid: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """How models of one kind take images, where that is more than rows in a text."""

    sight: Callable[[PreTrainedConfig], Sight] = lambda _: Sight()
    grid: Callable[[PreTrainedConfig, Mapping[str, Any]], Grid] = lambda _, __: (0, 0)
    """Height and width of the rows of what the processor gave, where they have places on a grid."""
    options: Callable[[PreTrainedConfig, Any], dict[str, Any]] = lambda _, __: {}
    """How its processor is called beyond its own settings: images of any size take no more rows than are allowed."""
    numbered: str = ""
    """What stands before an image of a prompt, with its number among them from 0 in the place of {}."""
    joined: Callable[[str], str] = lambda text: text
    """What a prompt becomes once its images are spelled, where that depends on what stands beside them."""


def _qwen_grid(config: PreTrainedConfig, prepared: Mapping[str, Any]) -> Grid:
    _, high, wide = prepared["image_grid_thw"][0].tolist()
    merged = config.vision_config.spatial_merge_size
    return high // merged, wide // merged


def _qwen_options(config: PreTrainedConfig, processor: Any, frames: int = 1) -> dict[str, Any]:
    vision = config.vision_config
    most = IMAGE_ROWS * (vision.patch_size * vision.spatial_merge_size) ** 2 * frames  # pixels
    if processor.size.longest_edge <= most:
        return {}
    return {"size": {"shortest_edge": min(processor.size.shortest_edge, most), "longest_edge": most}}


def _glm_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    """Its processor counts the pixels of all frames of a patch, of which an image has as many."""
    return _qwen_options(config, processor, processor.temporal_patch_size)


def _kimi_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    """Its processor rounds each side up after it counted patches: by three of them at most."""
    side, most = int(processor.size.max_height), IMAGE_ROWS * prod(config.vision_config.merge_kernel_size)
    return {"max_patches": min(processor.max_patches, most - 3 * (side + most // side) - 9)}


def _pixtral_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    side = int(config.vision_config.patch_size) * int(config.spatial_merge_size)
    return {"size": {"longest_edge": min(processor.size.longest_edge, isqrt(IMAGE_ROWS) * side)}}


def _llama4_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    vision = config.vision_config
    rows = int((vision.image_size // vision.patch_size) ** 2 * vision.pixel_shuffle_ratio**2)  # of a tile
    return {"max_patches": min(processor.max_patches, IMAGE_ROWS // rows - 1)}


def _gemma4_sight(config: PreTrainedConfig) -> Sight:
    together = getattr(config.get_text_config(), "use_bidirectional_attention", None) == "vision"
    return Sight(together="window" if together else "no", by_layer=True)


def _hunyuan_sight(config: PreTrainedConfig) -> Sight:
    return Sight(axes=len(config.get_text_config().rope_parameters["mrope_section"]), beside=True)


def _hunyuan_grid(config: PreTrainedConfig, prepared: Mapping[str, Any]) -> Grid:
    """Each line of rows has an end."""
    height, width = _qwen_grid(config, prepared)
    return height, width + 1


def _with_shared_borders(text: str) -> str:
    """Images side by side share what stands between them, and words behind one begin with a space (Idefics 2)."""
    border = "<fake_token_around_image>"
    return re.sub(rf"{border}(?=[^\s<])", f"{border} ", text.replace(2 * border, border))


_QWEN = Family(lambda _: Sight(axes=3), _qwen_grid, _qwen_options)
_OF_THEIR_OWN: dict[str, Family] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga"), replace(_QWEN, options=_glm_options)),
    **dict.fromkeys(("gemma4", "gemma4_unified"), Family(_gemma4_sight)),
    "gemma3": Family(lambda _: Sight(together="all")),
    "idefics2": Family(joined=_with_shared_borders),
    "hunyuan_vl": Family(_hunyuan_sight, _hunyuan_grid, _qwen_options),
    "kimi_k25": Family(options=_kimi_options),
    "llama4": Family(options=_llama4_options),
    **dict.fromkeys(("minimax_m3_vl", "exaone4_5", "hyperclovax_vision_v2", "lfm3_vl"), Family(options=_qwen_options)),
    **dict.fromkeys(("mistral3", "lighton_ocr"), Family(options=_pixtral_options)),
    "minicpmv4_6": Family(numbered="<image_id>{}</image_id>"),
}
# Models whose text streams and whose images are not read, and why.
_TIMM = "its tower needs the timm library"
UNREAD = {
    "cosmos3_omni": "transformers has no processor for it",
    "emu3": "images are tokens of its own vocabulary, which a model beside it makes",
    "ernie4_5_vl_moe": "rows of images go through experts of their own",
    "fast_vlm": _TIMM,
    "fuyu": "its processor writes prompts as a whole",
    "gemma3n": _TIMM,
    "minicpm_ocr": "torchvision alone prepares its images, and it has not been tried",
    "minicpmv4_7": "rows of its slices have positions of their own kind",
    "perception_lm": _TIMM,
    "phi4_multimodal": "its language model has weights that are for images alone",
    "pp_chart2table": "it answers without a chat",
    **dict.fromkeys(
        ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
        "its processor is for sound and films too, and was not tried",
    ),
    "video_llava": "its processor takes images for frames of a film",
}
FAMILIES: dict[str, Family] = {name: _OF_THEIR_OWN.get(name, Family()) for name in SEEING}


class ImagePrompts:
    """Images in the prompts of one model. Safe from several threads."""

    def __init__(self, folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder, self._config, self._tokenizer = folder, config, tokenizer
        self._family, self._most = FAMILIES[config.model_type], SEEING[config.model_type]
        self.images = Images(self._family.sight(config), config.image_token_id, self._most)
        # Ovis 2 has rows for tokens around an image as well.
        self._standing = {self.images.word, *getattr(config, "visual_indicator_token_ids", ())}
        # Between a prompt's tokens and the text that is begun with them nothing else may hold an image.
        self._recent: deque[Image] = deque(maxlen=RECENT)

    @property
    def place(self) -> str:
        """What the model's chat template writes for an image."""
        return self._processor.place

    def image(self, content: bytes, at: str) -> Image:
        """The image in a file. Raises BadMessages that begins with `at` for one that cannot be read."""
        found = self.images.known(number_of(content))
        if found is None:
            prepared = self._prepared(content, at)
            height, width = self._family.grid(self._config, prepared.inputs)
            found = self.images.keep(
                Image(
                    number_of(content),
                    self._words(prepared),
                    prepared.text,
                    lambda: self._prepared(content, "an image").inputs,
                    height,
                    width,
                )
            )
        self._recent.append(found)
        return found

    def spelled(self, text: str, images: Items[Image]) -> str:
        """A prompt's text with the rows of images at their places. Raises BadMessages where those are not as many."""
        parts = text.split(self.place)
        if len(parts) != len(images) + 1:
            raise BadMessages(
                f"the model's chat template writes {len(parts) - 1} images of the {len(images)} in these messages.",
                hint="images in messages of the user.",
            )
        texts = [self._numbered(image.text, number) for number, image in enumerate(images)]
        spelled = parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))
        return self._family.joined(spelled) if images else spelled

    def with_rows(self, tokens: list[int], images: Items[Image]) -> list[int]:
        """Token ids in which those that stand for rows of images are rows of these. Raises BadMessages."""
        rows = [token for image in images for token in image.tokens]
        places = [at for at, token in enumerate(tokens) if token in self._standing]
        if len(places) != len(rows):
            raise BadMessages(f"the prompt has {len(places)} places for the {len(rows)} rows of its images.")
        for at, row in zip(places, rows, strict=True):
            tokens[at] = row
        return tokens

    def _numbered(self, text: str, number: int) -> str:
        """What the processor wrote for an image that is alone in its prompt, with its number in this one."""
        first = self._family.numbered.format(0)
        return self._family.numbered.format(number) + text.removeprefix(first) if text.startswith(first) else text

    def _words(self, prepared: PreparedImage) -> tuple[int, ...]:
        """The tokens that stand for its rows."""
        return tuple(token for token in prepared.ids if token in self._standing)

    def _prepared(self, content: bytes, at: str) -> PreparedImage:
        """Where a family's processor has no setting that would keep an image small, the picture is made smaller."""
        picture = pixels(content, at)
        options = self._family.options(self._config, self._processor.of_images)
        for _ in range(TRIES):
            try:
                found = self._processor(picture, options)
            except ValueError as problem:  # of shapes that it does not take
                raise BadMessages(f"{at}: the model does not take this image: {problem}") from problem
            rows = len(self._words(found))
            if rows <= self._most:
                return found
            by = SHRINK * sqrt(self._most / rows)
            picture = picture.resize((max(1, int(picture.width * by)), max(1, int(picture.height * by))))
        raise BadMessages(
            f"{at}: the image takes {rows:,} tokens; {self._most:,} are allowed.", hint="a smaller image."
        )

    @cached_property
    def _processor(self) -> ImageProcessor:
        return ImageProcessor(self._folder, self._config.model_type, self._tokenizer)
