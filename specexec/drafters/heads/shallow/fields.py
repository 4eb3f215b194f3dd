"""What a folder says of a head without layers: which kind it is, and its tensors in all published spellings.

Medusa by FasterDecoding and by vLLM, Hydra and Hydra++, IBM's MLP speculators, Apple's ReDrafter. Knows no torch:
`plan` reads headers alone.   H hidden size   V vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from specexec.drafters.heads.refusal import TargetShape, of_another, unread
from specexec.sizes import LAST

MEDUSA, HYDRA, HYDRA_PREFIX, MLP, REDRAFTER = "Medusa", "Hydra", "Hydra++", "MLP speculator", "ReDrafter"
KINDS = (MEDUSA, HYDRA, HYDRA_PREFIX, MLP, REDRAFTER)
REDRAFTER_PLACES = 4  # tokens that it guesses: its authors' beams have so many
MOST_PLACES = 64  # published heads guess three to eight tokens
PREFIX = "prefix_embeding_layer."  # so it is spelled
_MEDUSA = (
    (r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.linear\.(\w+)", r"residuals.\1.\2.linear.\3"),
    (r"(?:medusa_heads?\.)?(\d+)\.\d+\.(weight|bias)", r"out.\1.\2"),
    (r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(\w+)", r"residuals.\1.\2.linear.\3"),
    (r"(?:medusa_heads\.)?lm_heads\.(\d+)\.(\w+)", r"out.\1.\2"),
)
_HYDRA = (
    (r"hydra_mlp\.(\d+)\.(\d+)\.(\w+)\.(\w+)", r"residuals.\1.\2.\3.\4"),
    (r"hydra_lm_head\.(\d+)\.(?:1\.)?(\w+)", r"out.\1.\2"),
    (r"prefix_embeding_layer\.layers\.0\.(.+)", r"prefix.\1"),
    (r"prefix_embeding_layer\.norm\.(\w+)", r"prefix_norm.\1"),
)
_REDRAFTER = (
    (r"lm_head\.(\d+)\.linear\.(\w+)", r"residuals.\1.linear.\2"),
    (r"lm_head\.\d+\.(weight)", r"out.\1"),
    (r"(rnn_u|rnn_w|input_proj)\.(\w+)", r"\1.\2"),
)
_MLP = ((r"speculator\.(emb|proj|head|ln)\.(\d+)\.(\w+)", r"\1.\2.\3"),)
_SPELLINGS = {MEDUSA: _MEDUSA, HYDRA: _HYDRA, HYDRA_PREFIX: _HYDRA, MLP: _MLP, REDRAFTER: _REDRAFTER}
_ONLY_TRAINING = (f"{PREFIX}embed_tokens.", f"{PREFIX}layers.0.self_attn.rotary_emb.")


def kind_by(names: Iterable[str]) -> str | None:
    """Which of them, by the published names of its tensors; None for something else."""
    held = set(names)
    if any(name.startswith("hydra_mlp.") for name in held):
        return HYDRA_PREFIX if any(name.startswith(PREFIX) for name in held) else HYDRA
    marks = {MLP: {"speculator.proj.0.weight"}, REDRAFTER: {"rnn_u.weight", "lm_head.0.linear.weight"}}
    if found := next((kind for kind, marking in marks.items() if held & marking), None):
        return found
    return (
        MEDUSA if any(re.fullmatch(_MEDUSA[1][0], name) or re.fullmatch(_MEDUSA[3][0], name) for name in held) else None
    )


def own_names(kind: str, names: Iterable[str], tied: bool = False) -> dict[str, str]:
    """What published tensors are called here; those left out that guess nothing, or repeat others (`tied`)."""
    found = {name: _own_name(kind, name) for name in names if not name.startswith(_ONLY_TRAINING)}
    if tied:
        found = {
            name: own for name, own in found.items() if not re.match(r"(emb|head|ln)\.[1-9]|proj\.([2-9]|1\d)", own)
        }
    return found


def _own_name(kind: str, name: str) -> str:
    for pattern, own in _SPELLINGS[kind]:
        if match := re.fullmatch(pattern, name):
            found = match.expand(own)
            if kind == HYDRA_PREFIX:  # every block has a dropout before it
                found = re.sub(r"^(residuals\.\d+)\.(\d+)", lambda one: f"{one[1]}.{int(one[2]) // 2}", found)
            return found
    return name


@dataclass(frozen=True)
class ShallowFields:
    """One head. `readings`: the state of the target that it reads as published, and one that may be meant instead.

    `blocks`: residual blocks of each of its networks. `scaled`, `tied`: of an MLP speculator, whether it scales what it
    reads, and whether all stages but the first share their weights.
    """

    kind: str
    places: int
    hidden: int
    vocabulary: int
    readings: tuple[tuple[int], ...] = ((LAST,),)
    blocks: int = 1
    inner: int = 0
    scaled: bool = False
    tied: bool = False

    @classmethod
    def of(
        cls, settings: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], target: TargetShape, name: str
    ) -> ShallowFields:
        """`shapes` by published names. Raises BadDrafter, by name, for what is unknown or misfits."""
        kind = kind_by(shapes)
        assert kind is not None, "asked before"
        tied = bool(settings.get("tie_weights"))
        own = {own: shapes[published] for published, own in own_names(kind, shapes, tied).items()}
        out = own.get("head.0.weight" if kind == MLP else "out.weight" if kind == REDRAFTER else "out.0.weight", ())
        if len(out) != 2:
            raise unread(kind, name, "its matrix of tokens is missing")
        (vocabulary, inner), hidden = out, _hidden(kind, own, settings)
        if hidden != target.hidden:
            raise of_another(kind, name, hidden, target.hidden, "hidden numbers")
        if vocabulary != target.vocabulary:
            raise of_another(kind, name, vocabulary, target.vocabulary, "tokens")
        networks, blocks = _counts(own)
        places = {MLP: _stages(own, settings, tied), REDRAFTER: REDRAFTER_PLACES}.get(kind, networks)
        if not 0 < places <= MOST_PLACES:
            raise unread(kind, name, f"it guesses {places} tokens, and at most {MOST_PLACES} are read")
        offset = settings.get("hidden_state_offset", 0)
        if type(offset) is not int or not 0 <= offset <= target.layers:
            raise unread(kind, name, f"its hidden_state_offset is {offset!r}")
        # Behind the target's last norm, or before it; with an offset the states are those of an inner layer.
        readings = ((target.layers - offset,),) if offset else ((LAST,), (target.layers,))
        scaled = bool(settings.get("scale_input"))
        return cls(kind, places, target.hidden, vocabulary, readings, blocks, inner, scaled, tied)


def _hidden(kind: str, own: Mapping[str, tuple[int, ...]], settings: Mapping[str, object]) -> object:
    """The hidden size of the target that it was made for."""
    if kind == MLP:
        return own["proj.0.weight"][-1]
    if kind == REDRAFTER:
        return own["rnn_w.weight"][-1] if "rnn_w.weight" in own else settings.get("hidden_size")
    return own["out.0.weight"][-1]


def _counts(own: Iterable[str]) -> tuple[int, int]:
    """Networks, and blocks of each."""
    outs = {match[1] for name in own if (match := re.match(r"out\.(\d+)\.weight", name))}
    blocks = {match[1] for name in own if (match := re.match(r"residuals\.(?:\d+\.)?(\d+)\.linear\.", name))}
    return len(outs), len(blocks)


def _stages(own: Mapping[str, tuple[int, ...]], settings: Mapping[str, object], tied: bool) -> int:
    """Those of an MLP speculator; where they share weights its config.json alone says how many."""
    given = settings.get("n_predict")
    return given if tied and type(given) is int else sum(name.startswith("head.") for name in own)


def counted_as(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Settings of a model that takes as much memory: of Hydra++ one layer keeps keys and values, of others none.

    `shapes` by published names.
    """
    own = {own: shapes[name] for name, own in own_names(kind, shapes).items()}
    key = own.get("prefix.self_attn.k_proj.weight")
    out = next((shape for name, shape in own.items() if name.startswith(("out.", "head."))), (1, 1))
    return {
        "num_hidden_layers": 1 if key else max(_counts(own)[0], 1),
        "num_attention_heads": 1,
        "num_key_value_heads": 0 if key is None else 1,
        "head_dim": 1 if key is None else key[0],
        "hidden_size": max((shape[-1] for shape in own.values()), default=1),
        "vocab_size": out[0],
    }
