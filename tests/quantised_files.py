"""Tiny checkpoints in other programs' formats: weights stored anew, config.json with what names the format."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from offload.checkpoint.contents import SINGLE
from offload.checkpoint.documents import Json
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.stored import fold
from tests.tiny import VOCABULARY

Stored = Mapping[str, torch.Tensor]


def rewrite(
    folder: Path, config: Json, store: Callable[[str, torch.Tensor], Stored], only: str = "_proj.weight"
) -> Path:
    """Store each weight of a tiny checkpoint whose name ends so by `store(name without .weight, weight)`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / SINGLE).items():
        tensors |= store(name.removesuffix(".weight"), weight) if name.endswith(only) else {name: weight}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    set_config(folder, config)
    return folder


def set_config(folder: Path, config: Json) -> None:
    """Name the format in config.json."""
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))


def add_tokenizer(path: Path) -> None:
    """A word for each token id of a tiny model."""
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(path / "tokenizer.json"))


def folder(path: Path, config: Json, tensors: Stored) -> None:
    """A folder that holds just these tensors."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / SINGLE)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))


def dense(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every weight in few bits of a folder as we dequantise it, by its name on disk."""
    tensors = load_file(folder / SINGLE)
    found: dict[str, torch.Tensor] = {}
    for name, weight in fold(open_folder(folder)).quantised.items():
        found[name] = torch.empty(weight.shape, dtype=dtype)
        dequantise(weight, {role: tensors[entry.name] for role, entry in weight.members.items()}, found[name])
    return found
