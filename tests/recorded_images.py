"""Pixels that transformers' image processors prepared with torchvision, recorded, for models that have nothing else.

scripts/record_images.py made them of the pictures in tests/pictured.py; tests need no torchvision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ImageProcessingMixin

FOLDER = Path(__file__).parent / "recorded" / "images"
SETTINGS = "settings"


def number_of(picture: Image.Image) -> str:
    """Tells pictures apart by their pixels."""
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()[:16]


def record(model_type: str, processor: Any, pictures: Iterable[Image.Image]) -> Path:
    """Keep what the processor makes of each picture alone, and its settings."""
    kept: dict[str, Any] = {SETTINGS: json.dumps(processor.to_dict())}
    asked = {"return_row_col_info": True} if hasattr(processor, "return_row_col_info") else {}
    for picture in pictures:
        for name, value in processor(images=[picture], return_tensors="pt", **asked).items():
            exact = value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
            kept[f"{number_of(picture)}.{name}"] = np.asarray(exact)
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{model_type}.npz"
    np.savez_compressed(file, **kept)
    return file


class RecordedProcessor(ImageProcessingMixin):
    """The image processor of a family, for the pictures that were recorded."""

    def __init__(self, model_type: str) -> None:
        with np.load(FOLDER / f"{model_type}.npz") as held:
            self._held = {name: held[name] for name in held.files}
        self.given: dict[str, Any] = json.loads(str(self._held[SETTINGS]))
        for name, value in self.given.items():
            setattr(self, name, SimpleNamespace(**value) if isinstance(value, dict) else value)

    def write(self, folder: Path) -> None:
        """As the processor itself writes its settings."""
        (folder / "preprocessor_config.json").write_text(json.dumps(self.given), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Its settings."""
        return self.given

    def fetch_images(self, images: Any) -> Any:
        """They are here."""
        return images

    def __call__(self, images: Any, **_: object) -> BatchFeature:
        """What was made of these pictures, one after the other."""
        flat = [one for each in images for one in (each if isinstance(each, list) else [each])]
        made = [self._of(number_of(picture)) for picture in flat]
        return BatchFeature({name: torch.cat([one[name] for one in made]) for name in made[0]})

    def _of(self, number: str) -> dict[str, torch.Tensor]:
        start = f"{number}."
        return {
            name.removeprefix(start): torch.from_numpy(held)
            for name, held in self._held.items()
            if name.startswith(start)
        }
