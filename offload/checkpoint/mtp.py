"""The layer that some checkpoints bring to guess further ahead (multi-token prediction), found by name. No torch.

DeepSeek-V3 (arXiv 2412.19437, section 2.2) trains a decoder layer of the model's own kind that reads the last hidden
state and the token after it. Files keep it behind the last layer, or under `mtp.`; no causal model computes with it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from offload.checkpoint.documents import Json
from offload.checkpoint.roles import LAYER

if TYPE_CHECKING:
    from offload.checkpoint.headers import Folder

T = TypeVar("T")

PROJECTION = "eh_proj"
# What lies around the layer, by the names that DeepSeek gives it: two norms, their projection, and the norm at the end.
AROUND = ("enorm", "hnorm", PROJECTION, "shared_head.norm")
# They repeat the model's own embeddings and head.
REPEATED = re.compile(r"\.(embed_tokens|shared_head\.head)\.")
_BEHIND = re.compile(rf"^(?P<layers>.*?\blayers\.)(?P<number>\d+)\.{PROJECTION}\.")
_OTHERS = re.compile(r"^(model\.)?(mtp\.|mtp_\w+\.)")
# Qwen3-Next, Qwen3.5 and others keep it under `mtp.`.
_QWEN = {
    "mtp.layers.0.": "",
    "mtp.fc.": f"{PROJECTION}.",
    "mtp.pre_fc_norm_embedding.": "enorm.",
    "mtp.pre_fc_norm_hidden.": "hnorm.",
    "mtp.norm.": "shared_head.norm.",
}


def mtp_tensors(config: Mapping[str, Json], entries: Mapping[str, T]) -> dict[str, T]:
    """Those of layers that guess further ahead, in whatever way they are stored."""
    count = config.get("num_hidden_layers")
    behind = {match["layers"] + match["number"] + "." for match in map(_BEHIND.match, entries) if match}
    further = tuple(start for start in behind if isinstance(count, int) and int(start.split(".")[-2]) >= count)
    return {name: entry for name, entry in entries.items() if _OTHERS.match(name) or name.startswith(further or "\0")}


def mtp_names(folder: "Folder") -> dict[str, str]:
    """What the tensors of that layer would be called if it were the model's next one; empty if there is none known.

    The layer gets the number `num_hidden_layers`, and what is around it the names AROUND. Of several only the first.
    """
    count = folder.config.get("num_hidden_layers")
    own = next((match for match in map(LAYER.search, folder.entries) if match and "layers." in match[0]), None)
    if own is None or not isinstance(count, int):
        return {}
    start = f"{own.string[: own.end() - len(own[1]) - 1]}{count}."
    found = {name: name for name in folder.mtp if name.startswith(start)}
    for stored, called in _QWEN.items():
        found |= {name: start + called + name.removeprefix(stored) for name in folder.mtp if name.startswith(stored)}
    found = {name: new for name, new in found.items() if not REPEATED.search(name)}
    whole = all(any(new.startswith(f"{start}{part}.") for new in found.values()) for part in AROUND)
    return found if whole else {}


def mtp_folder(folder: "Folder") -> "Folder":
    """The folder with the tensors of that layer alone, called as the model's next one."""
    names = mtp_names(folder)
    return replace(folder, entries={new: replace(folder.mtp[name], name=new) for name, new in names.items()}, mtp={})
