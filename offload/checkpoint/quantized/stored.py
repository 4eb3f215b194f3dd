"""Which tensors of a folder are parts of quantised weights, found by every format. Knows no torch and no arithmetic."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, read_small
from offload.checkpoint.quantized.formats import FORMATS, METHODS
from offload.checkpoint.quantized.weight import Quantised, damaged
from offload.errors import UnsupportedModel

UNNAMED = "a method that its config.json does not name"


@dataclass(frozen=True)
class Folded:
    """A folder's tensors, those of quantised weights taken together."""

    dense: Mapping[str, Entry]
    quantised: Mapping[str, Quantised]


def fold(folder: Folder) -> Folded:
    """Take the tensors of each quantised weight together; what does not add up is refused by name."""
    refuse_unknown(folder)
    found = {weight.name: weight for one in FORMATS for weight in one.find(folder)}
    used = {entry.name for weight in found.values() for entry in weight.members.values()}
    return Folded({name: entry for name, entry in folder.entries.items() if name not in used}, found)


def check_orders(folded: Folded) -> None:
    """Read which group of a row each input is in, where files say so. Raises CorruptShard for one that is not there."""
    for weight in folded.quantised.values():
        if (order := weight.members.get("order")) is None:
            continue
        groups = math.prod(weight.members["scales"].shape) // weight.shape[0]
        numbers = np.frombuffer(read_small(order), "<i4" if order.dtype == "I32" else "<i8")
        first, last = int(numbers.min()), int(numbers.max())
        if last >= groups:
            raise damaged(weight.name, f"'{order.name}' names group {last}, there are {groups}")
        if first < 0 <= last:  # all negative: never filled, so in order
            raise damaged(weight.name, f"'{order.name}' names group {first}, and others that are there")


def refuse_unknown(folder: Folder) -> None:
    """Raise UnsupportedModel for a method of quantisation that no format here can undo."""
    config = folder.config.get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", UNNAMED) if isinstance(config, dict) else UNNAMED
    if method not in METHODS:
        raise UnsupportedModel(
            f"{folder.path} is quantised with {method}, which cannot be streamed.",
            "It is quant_method of quantization_config that says so. "
            f"Streamed are {', '.join(one.title for one in FORMATS)} and specexec's own packs.",
            "the 16-bit version of the model, or one in a format that is streamed.",
        )
