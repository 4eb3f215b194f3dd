"""What a folder says of an EAGLE head: its tensors and its config in the spellings of all who publish such heads.

EAGLE-3 (Li et al. 2025) reads a few inner layers of its target, EAGLE-1 and 2 and HASS its last hidden state. Knows no
torch: `plan` reads headers alone.   x_j is what flows into layer j of the target   H hidden size   V vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from specexec.drafters.heads.refusal import TargetShape, of_another, unread
from specexec.errors import BadDrafter
from specexec.sizes import LAST

NAMES = {1: "EAGLE", 3: "EAGLE-3"}
PARALLEL = "P-EAGLE"
KINDS = (*NAMES.values(), PARALLEL)
FEATURES = "fc.weight"
MASK = "mask_hidden"  # what masks of P-EAGLE read in the place of the target's states
PLACES = 8  # tokens that P-EAGLE guesses at once, where its config.json says nothing
MARK = "layers.0.hidden_norm.weight"  # what EAGLE-3 has and EAGLE-1 has not
LAYERS = ("llama", "qwen3", "qwen2")  # whose layers a head may be made of
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
USUAL_TAPS = 3
IDS = "eagle_aux_hidden_state_layer_ids"
_ONLY_TRAINING = ("verifier_norm.", "verifier_lm_head.", "rotary_emb.", "layers.0.self_attn.rotary_emb.")
_LATER_NORM = re.compile(r"^layers\.[1-9]\d*\.hidden_norm\.")
_SWITCHES = {  # what cannot be had, by what asks for it
    "use_mtp_layernorm": True,
    "use_aux_hidden_state": False,
}


def own_name(name: str) -> str | None:
    """The name that a published tensor has here; None for what only training and converters use."""
    name = name.removeprefix("model.")
    if name.startswith("midlayer."):
        name = f"layers.0.{name.removeprefix('midlayer.')}"
    if _LATER_NORM.match(name):  # SGLang: of an ordinary layer it is the first norm
        name = name.replace("hidden_norm", "input_layernorm")
    if name == "draft_id_to_target_id":
        name = "d2t"
    return None if name.startswith(_ONLY_TRAINING) else name


def generation(names: Iterable[str]) -> int | None:
    """3 or 1 (which 2 and HASS share) of the tensors of an EAGLE head, by the names they have here; else None."""
    held = set(names)
    if FEATURES not in held or not any(name.startswith("layers.0.self_attn.") for name in held):
        return None
    return 3 if MARK in held else 1


def kind_by(names: Iterable[str]) -> str | None:
    """As people call it, by the names that its tensors have here; None for something else."""
    held = set(names)
    found = generation(held)
    return PARALLEL if found == 3 and MASK in held else NAMES.get(found or 0)


@dataclass(frozen=True)
class EagleFields:
    """One head for one target. `taps`: the x_j that it reads, in the order in which fc reads them.

    `other_taps`: what they are if the ids were written by the other of two conventions in use; None where no ids are
    written. `layer`: a config.json of a model of the head's own layers.
    """

    generation: int
    layer: Mapping[str, object]
    taps: tuple[int, ...]
    other_taps: tuple[int, ...] | None
    target_layers: int
    vocabulary: int
    """Tokens that it can name."""
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    mask: int | None = None
    places: int = 1
    """The token behind the text by which it guesses so many at once (P-EAGLE)."""

    @property
    def kind(self) -> str:
        """As people call it."""
        return NAMES[self.generation] if self.mask is None else PARALLEL

    @property
    def readings(self) -> tuple[tuple[int, ...], ...]:
        """`taps`; then `other_taps`; then both with the other side of the target's last norm, where they read there."""
        found = [self.taps, *([] if self.other_taps is None else [self.other_taps])]
        turned = {self.target_layers: LAST, LAST: self.target_layers}
        found += [tuple(turned.get(tap, tap) for tap in taps) for taps in found]
        return tuple(dict.fromkeys(found))

    @classmethod
    def of(
        cls, settings: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], target: TargetShape, name: str
    ) -> EagleFields:
        """`shapes` by the names that tensors have here. Raises BadDrafter, by name, for what is unknown or misfits."""
        found = generation(shapes)
        assert found is not None, "asked before"
        kind, given = str(kind_by(shapes)), _with_inner(settings)
        layer = layer_config(settings, shapes)
        for key, wanted in _SWITCHES.items():
            if given.get(key) is wanted:
                raise unread(kind, name, f"its config.json has {key}: {wanted}")
        mask = given.get("mask_token_id", given.get("ptd_token_id"))
        if (MASK in shapes) != (mask is not None) or (given.get("parallel_drafting") and MASK not in shapes):
            there = "there" if MASK in shapes else "missing"
            raise unread(kind, name, f"its mask token is {mask!r}, and '{MASK}' is {there}")
        if layer["model_type"] not in LAYERS:
            raise unread(kind, name, f"its layers are those of {layer['model_type']!r}")
        if why := _odd_attention(layer):
            raise unread(kind, name, why)
        _check_sizes(kind, found, layer, shapes, target, name)
        taps, other = _taps(given, settings, shapes, target, name) if found == 3 else ((LAST,), None)
        given["fc_norm"] = given.get("fc_norm") or given.get("use_aux_norm")
        flags = {key: bool(given.get(key)) for key in NORMS}
        rows, places = rows_of(shapes, target.vocabulary), 1
        if mask is not None:
            places = _places(settings)
            if type(mask) is not int or not 0 <= mask < target.vocabulary or shapes[MASK][-1] != shapes[FEATURES][1]:
                raise unread(kind, name, f"its mask token is {mask!r}, its '{MASK}' has the shape {list(shapes[MASK])}")
        return cls(found, layer, taps, other, target.layers, rows, **flags, mask=mask, places=places)


def layer_config(settings: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """The config.json of a model of the head's own layers: apart in `speculators` folders, all around elsewhere."""
    apart = settings.get("transformer_layer_config")
    own = dict(apart) if isinstance(apart, Mapping) else dict(settings)
    numbers = [int(match[1]) for key in shapes if (match := re.match(r"layers\.(\d+)\.", key))]
    layers = max(numbers, default=0) + 1
    kinds = own.get("layer_types")
    own |= {"num_hidden_layers": layers, "model_type": own.get("model_type") or "llama"}
    if isinstance(kinds, list):
        own["layer_types"] = kinds[:layers]
    return own


def rows_of(shapes: Mapping[str, tuple[int, ...]], vocabulary: int) -> int:
    """Tokens that a head can name: its own, or those of its target."""
    return next((shapes[key][0] for key in ("lm_head.weight", "d2t") if key in shapes), vocabulary)


def tap_count(shapes: Mapping[str, tuple[int, ...]], hidden: int) -> int:
    """Hidden states of this size that a head reads of each token."""
    return max(shapes[FEATURES][1] // hidden, 1) if generation(shapes) == 3 else 1


def _places(settings: Mapping[str, object]) -> int:
    """Tokens that it is to guess at once: `speculators` keeps that with the ways to use a head."""
    own = settings.get("speculators_config")
    ways = own.get("proposal_methods") if isinstance(own, Mapping) else None
    first = ways[0] if isinstance(ways, list) and ways else None
    places = first.get("speculative_tokens") if isinstance(first, Mapping) else None
    return places if type(places) is int and places > 0 else PLACES


def _with_inner(settings: Mapping[str, object]) -> dict[str, object]:
    """Fields at the top, and those that SGLang and ModelOpt keep together."""
    inner = settings.get("eagle_config")
    return {**settings, **(inner if isinstance(inner, Mapping) else {})}


def _odd_attention(layer: Mapping[str, object]) -> str | None:
    """What of its layers' attention cannot be computed in trees, or is not known."""
    kinds = layer.get("layer_types")
    if isinstance(kinds, list) and any(one != "full_attention" for one in kinds):
        return "its layers have a window"
    given = layer.get("rope_parameters") or layer.get("rope_scaling")
    rope = given if isinstance(given, Mapping) else {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        return "its RoPE depends on the longest position of the whole tree"
    if any(isinstance(one, Mapping) for one in rope.values()):
        return "its RoPE differs from layer to layer"
    if any(one.get("partial_rotary_factor", 1) != 1 for one in (layer, rope)):
        return "its RoPE turns a part of each head only"
    return None


def _check_sizes(
    kind: str,
    found: int,
    layer: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    target: TargetShape,
    name: str,
) -> None:
    hidden = layer.get("hidden_size")
    if not isinstance(hidden, int) or len(shapes[FEATURES]) != 2 or shapes[FEATURES][0] != hidden:
        raise unread(kind, name, f"its hidden_size is {hidden!r} and its fc has the shape {list(shapes[FEATURES])}")
    inputs = shapes[FEATURES][1]
    if found == 1 and (hidden, inputs) != (target.hidden, 2 * target.hidden):
        raise of_another(kind, name, hidden, target.hidden, "hidden numbers")
    if found == 3 and inputs % target.hidden:
        raise of_another(kind, name, inputs // USUAL_TAPS, target.hidden, "hidden numbers")
    table = shapes.get("embed_tokens.weight")
    tokens = table[0] if table else layer.get("vocab_size")
    if tokens != target.vocabulary:
        raise of_another(kind, name, tokens, target.vocabulary, "tokens")
    if hidden != (table[1] if table else target.hidden):
        raise unread(kind, name, "its embeddings have another hidden size than its layers")
    if "lm_head.weight" not in shapes and (hidden != target.hidden or "d2t" in shapes):
        raise unread(kind, name, "it has no lm_head, and its target's does not fit it")
    rows, mapped = rows_of(shapes, target.vocabulary), shapes.get("d2t")
    if rows > target.vocabulary or (rows < target.vocabulary and mapped != (rows,)):
        has = "no d2t" if mapped is None else f"a d2t of {list(mapped)}"
        raise unread(kind, name, f"it names {rows} of {target.vocabulary} tokens and has {has}")


def _taps(
    given: Mapping[str, object],
    settings: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    target: TargetShape,
    name: str,
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """What the ids mean, and what they mean by the other convention.

    vLLM and `speculators` count what flows into layer j, x_j; SGLang, SpecForge and ModelOpt, whose fields stand apart
    in `eagle_config`, what flows out of it, x_{j+1}. Without ids both mean the same three.
    """
    ids, count = given.get(IDS), shapes[FEATURES][1] // target.hidden
    if ids is None:
        if count != USUAL_TAPS or given.get("num_aux_hidden_states") not in (None, USUAL_TAPS):
            raise unread("EAGLE-3", name, f"it reads {count} layers and does not say which")
        if target.layers < 6:
            raise unread("EAGLE-3", name, f"it does not say which layers it reads, and there are {target.layers}")
        return (2, target.layers // 2, target.layers - 3), None
    if not isinstance(ids, list) or any(type(one) is not int for one in ids) or len(ids) != count:
        raise unread("EAGLE-3", name, f"its {IDS} are {ids}, and its fc reads {count} layers")
    as_inputs, as_outputs = tuple(ids), tuple(one + 1 for one in ids)
    meant = (as_inputs, as_outputs) if settings.get(IDS) is not None else (as_outputs, as_inputs)
    fitting = [taps for taps in meant if all(0 <= one <= target.layers for one in taps)]
    if not fitting:
        raise BadDrafter(
            f"{name} is an EAGLE-3 head that reads the states at layers {ids}, this model has {target.layers}.",
            hint="the head of this model, --drafter ngram, or a smaller model of the same family.",
        )
    return fitting[0], fitting[1] if len(fitting) > 1 else None
