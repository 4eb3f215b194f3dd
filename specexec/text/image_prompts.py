"""Images in prompts: what a family's chat template writes for one becomes the tokens of its rows.

The pixels are prepared by transformers' own image processor of the family, in its form for Pillow: the same with or
without torchvision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from specexec.errors import BadMessages
from specexec.model.image_rows import Image, Images, Sight, number_of
from specexec.sizes import IMAGE_ROWS
from specexec.text.pictures import pixels

# The documents that say how images are prepared; newer models have the second one.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
MOST_IMAGES = 32  # in one prompt
RECENT = 2 * MOST_IMAGES


@dataclass(frozen=True)
class Shape:
    """The rows of one image: how many, and on a grid of which height and width, 0 where that is not asked."""

    rows: int
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class ImageMarks:
    """Texts by which a family's prompts show images: `place` is what its template writes, `row` each row of one.

    `before` and `after` stand around the rows, `between` their lines.
    """

    place: str
    row: str
    before: str = ""
    after: str = ""
    between: str = ""

    def spelled(self, shape: Shape) -> str:
        """One image in a prompt."""
        if not self.between:
            return self.before + self.row * shape.rows + self.after
        return self.before + self.between.join([self.row * shape.width] * shape.height) + self.after


@dataclass(frozen=True)
class TileMarks(ImageMarks):
    """Of an image that is cut into tiles, which are followed by all of it as one more (Llama 4)."""

    beside: str = ""
    below: str = ""

    def spelled(self, shape: Shape) -> str:
        """One image in a prompt; `shape` counts tiles in height and width."""
        tiles = shape.height * shape.width
        tile = self.row * (shape.rows // (tiles + (tiles > 1)))
        lines = [self.beside.join([tile] * shape.width) + self.below] * shape.height if tiles > 1 else []
        return self.before + "".join(lines) + self.place + tile + self.after


@dataclass(frozen=True)
class Family:
    """How models of one kind take images. `inputs` are what its tower takes of what the processor gives."""

    sight: Callable[[PreTrainedConfig], Sight]
    marks: Callable[[PreTrainedConfig, PreTrainedTokenizerBase], ImageMarks]
    shape: Callable[[PreTrainedConfig, Mapping[str, Any]], Shape]
    inputs: tuple[str, ...]
    options: Callable[[PreTrainedConfig, Any], dict[str, Any]] = lambda _, __: {}
    """How its processor is called beyond its own settings: no image takes more than IMAGE_ROWS rows."""
    backend: Literal["pil", "torchvision"] = "pil"
    """What prepares the pixels; torchvision where transformers has nothing else for the family."""


def _qwen_shape(config: PreTrainedConfig, prepared: Mapping[str, Any]) -> Shape:
    time, high, wide = prepared["image_grid_thw"][0].tolist()
    merged = config.vision_config.spatial_merge_size
    return Shape(time * high * wide // merged**2, high // merged, wide // merged)


def _qwen_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    vision = config.vision_config
    most = IMAGE_ROWS * (vision.patch_size * vision.spatial_merge_size) ** 2  # pixels
    if processor.size.longest_edge <= most:
        return {}
    return {"size": {"shortest_edge": min(processor.size.shortest_edge, most), "longest_edge": most}}


def _glm_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    """Its processor counts the pixels of all frames of a patch, of which an image has as many."""
    vision = config.vision_config
    most = IMAGE_ROWS * (vision.patch_size * vision.spatial_merge_size) ** 2 * processor.temporal_patch_size
    if processor.size.longest_edge <= most:
        return {}
    return {"size": {"shortest_edge": min(processor.size.shortest_edge, most), "longest_edge": most}}


def _kimi_shape(config: PreTrainedConfig, prepared: Mapping[str, Any]) -> Shape:
    return Shape(prepared["image_grid_thw"][0].prod().item() // prod(config.vision_config.merge_kernel_size))


def _kimi_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    """Its processor rounds each side up after it counted patches: by three of them at most."""
    side, most = int(processor.size.max_height), IMAGE_ROWS * prod(config.vision_config.merge_kernel_size)
    return {"max_patches": min(processor.max_patches, most - 3 * (side + most // side) - 9)}


def _pixtral_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    side = _pixtral_side(config)
    longest = min(processor.size.longest_edge, isqrt(IMAGE_ROWS) * side)
    return {"patch_size": side, "size": {"longest_edge": longest}}


def _pixtral_side(config: PreTrainedConfig) -> int:
    return int(config.vision_config.patch_size) * int(config.spatial_merge_size)


def _pixtral_shape(config: PreTrainedConfig, prepared: Mapping[str, Any]) -> Shape:
    high, wide = (int(length) // _pixtral_side(config) for length in prepared["image_sizes"][0])
    return Shape(high * wide, high, wide)


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def _plain_marks(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ImageMarks:
    word = _word(tokenizer, config.image_token_id)
    return ImageMarks(word, word)


def _gemma3_marks(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ImageMarks:
    begin, end = _word(tokenizer, config.boi_token_id), _word(tokenizer, config.eoi_token_id)
    return ImageMarks(begin, _word(tokenizer, config.image_token_id), f"\n\n{begin}", f"{end}\n\n")


def _gemma4_marks(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ImageMarks:
    word = _word(tokenizer, config.image_token_id)
    return ImageMarks(word, word, _word(tokenizer, config.boi_token_id), _word(tokenizer, config.eoi_token_id))


def _pixtral_marks(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ImageMarks:
    word = _word(tokenizer, config.image_token_id)
    return ImageMarks(word, word, "", "[IMG_END]", "[IMG_BREAK]")


def _minimax_marks(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ImageMarks:
    word = _word(tokenizer, config.image_token_id)
    return ImageMarks(word, word, "]<]start of image[>[", "]<]end of image[>[")


def _llama4_marks(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ImageMarks:
    row = _word(tokenizer, config.image_token_id)
    around = "<|image_start|>", "<|image_end|>"
    return TileMarks("<|image|>", row, *around, beside="<|tile_x_separator|>", below="<|tile_y_separator|>")


def _llama4_shape(config: PreTrainedConfig, prepared: Mapping[str, Any]) -> Shape:
    height, width = (int(tiles) for tiles in prepared["aspect_ratios"][0])
    return Shape(_tile_rows(config) * len(prepared["pixel_values"]), height, width)


def _llama4_options(config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    return {"max_patches": min(processor.max_patches, IMAGE_ROWS // _tile_rows(config) - 1)}


def _tile_rows(config: PreTrainedConfig) -> int:
    vision = config.vision_config
    patches: int = vision.image_size // vision.patch_size
    return int(patches**2 * vision.pixel_shuffle_ratio**2)


def _gemma4_sight(config: PreTrainedConfig) -> Sight:
    together = getattr(config.get_text_config(), "use_bidirectional_attention", None) == "vision"
    return Sight(together="window" if together else "no", by_layer=True)


def _gemma4_shape(_: PreTrainedConfig, prepared: Mapping[str, Any]) -> Shape:
    return Shape(int(prepared["num_soft_tokens_per_image"][0]))


_GRID = ("pixel_values", "image_grid_thw")
_QWEN = Family(lambda _: Sight(grid=True), _plain_marks, _qwen_shape, _GRID, _qwen_options)
_GEMMA4 = Family(_gemma4_sight, _gemma4_marks, _gemma4_shape, ("pixel_values", "image_position_ids"))
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
    "gemma3": Family(
        lambda _: Sight(together="all"),
        _gemma3_marks,
        lambda config, _: Shape(int(config.mm_tokens_per_image)),
        ("pixel_values",),
    ),
    "gemma4": _GEMMA4,
    "gemma4_unified": replace(_GEMMA4, backend="torchvision"),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), replace(_QWEN, options=_glm_options)),
    "kimi_k25": Family(lambda _: Sight(), _plain_marks, _kimi_shape, _GRID, _kimi_options, "torchvision"),
    "llama4": Family(
        lambda _: Sight(), _llama4_marks, _llama4_shape, ("pixel_values",), _llama4_options, "torchvision"
    ),
    "minimax_m3_vl": Family(lambda _: Sight(), _minimax_marks, _qwen_shape, _GRID, _qwen_options, "torchvision"),
    "mistral3": Family(
        lambda _: Sight(),
        _pixtral_marks,
        _pixtral_shape,
        ("pixel_values", "image_sizes"),
        _pixtral_options,
    ),
}


class ImagePrompts:
    """Images in the prompts of one model. Safe from several threads."""

    def __init__(self, folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder, self._config, self._family = folder, config, FAMILIES[config.model_type]
        self.marks = self._family.marks(config, tokenizer)
        self.images = Images(self._family.sight(config), config.image_token_id)
        # Between a prompt's tokens and the text that is begun with them nothing else may hold an image.
        self._recent: deque[Image] = deque(maxlen=RECENT)

    def image(self, content: bytes, at: str) -> Image:
        """The image in a file. Raises BadMessages that begins with `at` for one that cannot be read."""
        found = self.images.known(number_of(content))
        if found is None:
            shape = self._family.shape(self._config, self._prepared(content, at))
            if shape.rows > IMAGE_ROWS:
                raise BadMessages(
                    f"{at}: the image takes {shape.rows:,} tokens; {IMAGE_ROWS:,} are allowed.", hint="a smaller image."
                )
            image = Image(number_of(content), shape.rows, lambda: self._inputs(content), shape.height, shape.width)
            found = self.images.keep(image)
        self._recent.append(found)
        return found

    def spelled(self, text: str, images: Items[Image]) -> str:
        """A prompt's text with the rows of images at their places. Raises BadMessages where those are not as many."""
        parts = text.split(self.marks.place)
        if len(parts) != len(images) + 1:
            raise BadMessages(
                f"the model's chat template writes {len(parts) - 1} images of the {len(images)} in these messages.",
                hint="images in messages of the user.",
            )
        shown = [self.marks.spelled(Shape(one.rows, one.height, one.width)) for one in images]
        return parts[0] + "".join(image + part for image, part in zip(shown, parts[1:], strict=True))

    def with_rows(self, tokens: list[int], images: Items[Image]) -> list[int]:
        """Token ids in which those that stand for rows of images are rows of these. Raises BadMessages."""
        rows = [token for image in images for token in image.tokens]
        places = [at for at, token in enumerate(tokens) if token == self.images.word]
        if len(places) != len(rows):
            raise BadMessages(f"the prompt has {len(places)} places for the {len(rows)} rows of its images.")
        for at, row in zip(places, rows, strict=True):
            tokens[at] = row
        return tokens

    def _prepared(self, content: bytes, at: str) -> Mapping[str, Any]:
        picture = pixels(content, at)
        try:
            found: Mapping[str, Any] = self._processor(
                images=[picture], return_tensors="pt", **self._family.options(self._config, self._processor)
            )
        except ValueError as problem:  # of shapes that it does not take
            raise BadMessages(f"{at}: the model does not take this image: {problem}") from problem
        return found

    def _inputs(self, content: bytes) -> dict[str, Tensor]:
        prepared = self._prepared(content, "an image")
        return {name: prepared[name] for name in self._family.inputs}

    @cached_property
    def _processor(self) -> Any:
        return AutoImageProcessor.from_pretrained(self._folder, backend=self._family.backend, local_files_only=True)
