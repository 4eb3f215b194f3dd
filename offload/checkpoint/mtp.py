"""The layer that some checkpoints bring to guess further ahead (multi-token prediction), found by name. No torch.

DeepSeek-V3 (arXiv 2412.19437, section 2.2) trains a decoder layer of the model's own kind that reads the last hidden
state and the token after it. Files keep it behind the last layer, or under `mtp.`; no causal model computes with it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from offload.checkpoint.documents import Json
from offload.checkpoint.roles import LAYER, attentions

if TYPE_CHECKING:
    from offload.checkpoint.headers import Folder

T = TypeVar("T")

PROJECTION = "eh_proj"
# What lies around the layer, by the names that DeepSeek gives it: two norms, their projection, and the norm at the end.
AROUND = ("enorm", "hnorm", PROJECTION, "shared_head.norm")
OWN_HEAD = "shared_head.output"  # in its place the model's own head, where there is none
# They repeat the model's own embeddings and head.
REPEATED = re.compile(r"\.(embed_tokens|shared_head\.head)\.")
_BEHIND = re.compile(rf"^(?P<layers>.*?\blayers\.)(?P<number>\d+)\.{PROJECTION}\.")
_OTHERS = re.compile(r"^(model\.)?(mtp\.|mtp_\w+\.)")


@dataclass(frozen=True)
class MtpLayout:
    """How a publisher stores it: beginnings of names, the more special ones last, and what they are called here.

    `hidden_first`: the projection reads the hidden state, then the embedding. `before_norm`: hidden states are those
    before the last norm, the model's and its own. `around`: what lies around the layer. `further`: beginnings of the
    names of layers that follow it in the same step; what lies around them lies around the first. `halved`: it attends
    once, beside a model whose layers attend twice.
    """

    names: Mapping[str, str]
    hidden_first: bool = False
    before_norm: bool = False
    around: tuple[str, ...] = AROUND
    further: tuple[str, ...] = ()
    halved: bool = False

    @property
    def layers(self) -> int:
        """Layers of one step."""
        return 1 + len(self.further)


BEHIND = MtpLayout({})  # DeepSeek's, by DeepSeek's names
_LAYOUTS = (
    # Qwen3-Next, Qwen3.5, EXAONE-MoE
    MtpLayout(
        {
            "mtp.layers.0.": "",
            "mtp.fc.": f"{PROJECTION}.",
            "mtp.pre_fc_norm_embedding.": "enorm.",
            "mtp.pre_fc_norm_hidden.": "hnorm.",
            "mtp.norm.": "shared_head.norm.",
        }
    ),
    # MiMo-V2
    MtpLayout(
        {
            "model.mtp.layers.0.": "",
            "model.mtp.layers.0.pre_mlp_layernorm.": "post_attention_layernorm.",
            "model.mtp.layers.0.final_layernorm.": "shared_head.norm.",
        }
    ),
    # MiMo
    MtpLayout(
        {
            "model.mtp_layers.0.": "",
            "model.mtp_layers.0.token_layernorm.": "enorm.",
            "model.mtp_layers.0.hidden_layernorm.": "hnorm.",
            "model.mtp_layers.0.input_proj.": f"{PROJECTION}.",
            "model.mtp_layers.0.final_layernorm.": "shared_head.norm.",
        },
        hidden_first=True,
    ),
    # Ernie 4.5: its output goes to the head without a norm
    MtpLayout(
        {
            "model.mtp_block.0.": "",
            "model.mtp_emb_norm.0.": "enorm.",
            "model.mtp_hidden_norm.0.": "hnorm.",
            "model.mtp_linear_proj.0.": f"{PROJECTION}.",
        },
        around=AROUND[:-1],
    ),
    # Nemotron-H: attention, then experts, each a layer of its own
    MtpLayout(
        {"mtp.layers.0.": "", "mtp.layers.1.final_layernorm.": "shared_head.norm."},
        further=("mtp.layers.1.",),
    ),
    # LongCat-Flash
    MtpLayout(
        {
            "model.mtp.layers.0.": "",
            "model.mtp.layers.0.enorm.m.": "enorm.",
            "model.mtp.layers.0.hnorm.m.": "hnorm.",
            "model.mtp.layers.0.transformer_layer.": "",
            "model.mtp.norm.": "shared_head.norm.",
        },
        halved=True,
    ),
)


def mtp_tensors(config: Mapping[str, Json], entries: Mapping[str, T]) -> dict[str, T]:
    """Those of layers that guess further ahead, in whatever way they are stored; none where they are all there is."""
    if config.get("speculators_model_type") == "mtp":
        return {}
    count = _count(config)
    behind = {match["layers"] + match["number"] + "." for match in map(_BEHIND.match, entries) if match}
    further = tuple(start for start in behind if count is not None and int(start.split(".")[-2]) >= count)
    return {name: entry for name, entry in entries.items() if _OTHERS.match(name) or name.startswith(further or "\0")}


def mtp_names(folder: "Folder") -> dict[str, str]:
    """What the tensors of that layer would be called if it were the model's next one; empty if there is none known.

    The layer gets the number behind the last one, and what is around it the names AROUND. Of several steps only the
    first.
    """
    return _found(folder)[1]


def mtp_layout(folder: "Folder") -> MtpLayout:
    """How the tensors of that layer are stored."""
    return _found(folder)[0]


def _found(folder: "Folder") -> tuple[MtpLayout, dict[str, str]]:
    own = [match for match in map(LAYER.search, folder.entries) if match and "layers." in match[0]]
    if not own:
        return BEHIND, {}
    count, layers = _count(folder.config), own[0].string[: own[0].start(1)]
    if count is None:
        count = 1 + max(int(match[1]) for match in own if match.string.startswith(layers))
    start = f"{layers}{count}."
    # DeepSeek's, and Step's with a head of its own
    behind = (MtpLayout({start: ""}), MtpLayout({start: "", f"{start}transformer.": ""}, before_norm=True))
    for layout in (*behind, *_LAYOUTS):
        called = {begin: f"{layers}{count + at}." for at, begin in enumerate(layout.further, 1)}
        called |= {begin: start + part for begin, part in layout.names.items()}
        found = dict[str, str]()
        for begin, name in called.items():
            begun = [one for one in folder.mtp if one.startswith(begin) and not REPEATED.search(one)]
            found |= {one: name + one.removeprefix(begin) for one in begun}
        if all(any(new.startswith(f"{start}{part}.") for new in found.values()) for part in layout.around):
            return layout, found
    return BEHIND, {}


def _count(config: Mapping[str, Json]) -> int | None:
    """Layers of the model, where its config says so; LongCat calls hidden layers what attends."""
    count = config.get("num_hidden_layers" if attentions(config.get("model_type")) == 1 else "num_layers")
    return count if isinstance(count, int) else None


def mtp_folder(folder: "Folder") -> "Folder":
    """The folder with the tensors of that layer alone, called as the model's next one."""
    names = mtp_names(folder)
    return replace(folder, entries={new: replace(folder.mtp[name], name=new) for name, new in names.items()}, mtp={})
