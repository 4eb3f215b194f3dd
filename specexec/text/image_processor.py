"""transformers' processor of a model that sees: the pixels that its tower takes, and the text that its prompts hold.

The parts of it that are for films and sound are left out. Pixels are prepared with Pillow where transformers can, so
that they are the same with or without torchvision.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, Idefics3Processor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.utils.import_utils import is_torchvision_available

# The documents that say how images are prepared; newer models have the second one.
_OURS = ("image_processor", "tokenizer")
DOCUMENTS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class PreparedImage:
    """One image: what a model's tower may take of it, and what its prompts hold in its place."""

    inputs: Mapping[str, Any]
    text: str
    ids: tuple[int, ...]
    """Tokens of a prompt that is nothing but this image."""


class _Pixtral(ProcessorMixin):
    """As transformers' own, which is not there without torchvision: lines of rows, each with an end."""

    def __init__(
        self,
        image_processor: object = None,
        tokenizer: object = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self._line, self._end = image_token, image_break_token, image_end_token
        self.images_kwargs: Any = {"patch_size": patch_size * spatial_merge_size}

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: object) -> str:
        """What stands for one image."""
        side = self.images_kwargs["patch_size"]
        height, width = (int(length) // side for length in image_inputs["image_sizes"][image_idx])
        return self._line.join([self.image_token * width] * height) + self._end


class _Idefics2(ProcessorMixin):
    """As transformers' own writes an image that is alone in its prompt; that one does not say what it wrote."""

    image_token, _border = "<image>", "<fake_token_around_image>"

    def __init__(
        self,
        image_processor: object = None,
        tokenizer: object = None,
        image_seq_len: int = 64,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._rows, self._parts = image_seq_len, 5 if getattr(image_processor, "do_image_splitting", False) else 1

    def replace_image_token(self, *_: object, **__: object) -> str:
        """What stands for one image: its four quarters and all of it, or that alone."""
        return (self._border + self.image_token * self._rows) * self._parts + self._border


_PREPARED = "Images for it are prepared by torchvision, which"
# SmolVLM's own writes the same for images, and is not made without a package that spells out the times of films.
INSTEAD = {"SmolVLMProcessor": Idefics3Processor, "PixtralProcessor": _Pixtral, "Idefics2Processor": _Idefics2}
# It reads settings of its part for films, which that for images has as well.
_LIKE_FILMS = ("MiniCPMV4_6Processor",)
_AROUND = ("HunYuanVLProcessor",)  # takes an image between tokens that the chat template writes


class ImageProcessor:
    """The processor in a model's folder. `place` is what its chat template writes for an image."""

    def __init__(self, folder: Path, model_type: str, tokenizer: PreTrainedTokenizerBase) -> None:
        kind = _images_alone(_class_of(folder, model_type))
        self.of_images: Any = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        # It may add tokens, and some want one that fills up prompts.
        words = copy.deepcopy(tokenizer)
        words.pad_token = words.pad_token or words.eos_token
        parts = {"image_processor": self.of_images, "tokenizer": words}
        if kind.__name__ in _LIKE_FILMS:
            parts["video_processor"] = self.of_images
        given = [parts.get(name) for name in kind.get_attributes()]
        self._whole: Any = kind.from_args_and_dict(given, _settings(folder / DOCUMENTS[1]))
        self.place = self._asked = str(self._whole.image_token)
        if kind.__name__ in _AROUND:
            self._asked = f"{self._whole.image_start_token}{self.place}{self._whole.image_end_token}"

    def __call__(self, picture: Image.Image, options: Mapping[str, Any]) -> PreparedImage:
        """Prepare one image; `options` go to the part that prepares pixels. Raises ValueError for a shape too odd."""
        made: Mapping[str, Any] = self._whole(
            images=[picture], text=self._asked, return_tensors="pt", return_text_replacement_offsets=True, **options
        )
        (replaced,) = made["text_replacement_offsets"][0]
        return PreparedImage(made, str(replaced["replacement"]), tuple(made["input_ids"][0].tolist()))


def needs_torchvision(model_type: str) -> bool:
    """Whether transformers prepares images for these models with nothing else."""
    return "pil" not in IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {"pil": ""})


def missing_for(model_type: str) -> str:
    """What has to be installed before images for these models are prepared; empty if nothing has."""
    if not needs_torchvision(model_type):
        return ""
    if not is_torchvision_available():
        return f"{_PREPARED} is not here: {_install()}"
    try:
        import_module("torchvision")
    except Exception as problem:
        first = (str(problem).strip() or repr(problem)).splitlines()[0]
        return f"{_PREPARED} fails beside torch {torch.__version__} ({first}): {_install()}"
    return ""


def _install() -> str:
    """How to get the torchvision that belongs to the torch that is here."""
    build = torch.__version__.partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install torchvision{index}"


def _class_of(folder: Path, model_type: str) -> type[ProcessorMixin]:
    """The class that the folder names, or that transformers has for the model type. Raises ValueError if none."""
    named = [_settings(folder / name).get("processor_class") for name in (*DOCUMENTS, "tokenizer_config.json")]
    named.append(PROCESSOR_MAPPING_NAMES.get(model_type))
    found = (INSTEAD.get(name, getattr(transformers, name, None)) for name in named if isinstance(name, str))
    kind = next((one for one in found if isinstance(one, type) and issubclass(one, ProcessorMixin)), None)
    if kind is None:
        raise ValueError(f"transformers has no processor for {model_type!r}")
    return kind


def _images_alone(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same class, which takes anything for parts that are for films and sound."""

    def check(self: ProcessorMixin, name: str, part: object) -> object:
        return kind.check_argument_for_proper_class(self, name, part) if name in _OURS else None

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__module__": kind.__module__})


def _settings(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
