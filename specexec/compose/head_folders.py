"""Heads that draft: whether one came with a target, and folders that hold one instead of a model. Knows no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from offload import BadModelDir, cache_heads, is_quantised, mtp_names
from specexec.drafters.heads import assistant_fields as assistant
from specexec.drafters.heads import dflash_fields as dflash
from specexec.drafters.heads import eagle_fields as eagle
from specexec.drafters.heads import mtp_fields as mtp
from specexec.drafters.heads.refusal import TargetShape
from specexec.drafters.heads.shallow import fields as shallow
from specexec.drafters.registry import HEADS
from specexec.errors import BadDrafter

if TYPE_CHECKING:
    from offload import Folder, Json
    from specexec.drafters.registry import DrafterChoice

log = logging.getLogger(__name__)

UNKNOWN = "EAGLE in other parts"
# What class names, in lower case, say.
CLASSES = {
    "dflash": "DFlash", "eagle": UNKNOWN, "mlpspeculator": shallow.MLP, "speculator": "speculators",
    "medusa": shallow.MEDUSA,
}  # fmt: skip
# And what types, keys of config.json and tensors that no language model has.
TYPES = {
    "medusa": shallow.MEDUSA, "mlp_speculator": shallow.MLP, "recurrent_drafting_drafter": shallow.REDRAFTER
}  # fmt: skip
SETTINGS = {
    "speculators_model_type": "speculators", "dflash_config": "DFlash", "medusa_num_heads": shallow.MEDUSA,
    "hydra_num_heads": shallow.HYDRA,
}  # fmt: skip
MAYBE_EAGLE = (UNKNOWN, "speculators: eagle3", "speculators: eagle", "speculators: peagle")
MAYBE_DFLASH = ("DFlash", *(f"speculators: {one}" for one in dflash.KINDS))
TENSORS = {
    "d2t": UNKNOWN, "midlayer.": UNKNOWN, "fc.weight": UNKNOWN, "rnn_u": shallow.REDRAFTER, "speculator.": shallow.MLP,
    "hydra_mlp.": shallow.HYDRA,
}  # fmt: skip


def check_heads(choice: DrafterChoice, target: Folder, drafters: Iterable[Folder]) -> None:
    """Raises BadDrafter where the target lacks the layer that is asked for, or a folder is a head of no use here."""
    if "mtp" in choice.sources and not mtp_names(target):
        known = "stored in a way that is not read yet" if target.mtp else "its files hold no such layer"
        raise BadDrafter(
            f"--drafter mtp needs a layer of {target.called} that guesses further ahead: {known}.",
            "DeepSeek-V3, GLM-4.5, Qwen3-Next, Qwen3.5, MiMo and others have them; converted copies often lost them.",
            "--drafter ngram, a smaller model of the same family, or the publisher's own version of the model.",
        )
    for folder in drafters:
        kind = head_kind(folder)
        if kind in HEADS and is_quantised(folder):
            raise BadDrafter(
                f"{folder.called} is a {kind} head in few bits, which cannot be loaded yet.",
                hint="the head as it was published in 16 bits.",
            )
        if kind in dflash.KINDS.values():
            fields = dflash.DFlashFields.of(folder.config, [*folder.entries], str(folder.called))
            fields.check(folder.config, _shape_of(target), str(folder.called))
        elif kind == assistant.KIND:
            own = cache_heads(as_model(folder).config | {"num_kv_shared_layers": 0})
            assistant.AssistantFields.of(folder.config, str(folder.called)).check(
                folder.config, own, target.config, cache_heads(target.config), str(folder.called)
            )
        elif kind == mtp.KIND:
            mtp.check(folder.config, _named(folder, mtp.own_name), _shape_of(target), str(folder.called))
        elif kind in shallow.KINDS:
            shallow.ShallowFields.of(folder.config, _published(folder), _shape_of(target), str(folder.called))
        elif kind in HEADS:
            eagle.EagleFields.of(folder.config, shapes(folder), _shape_of(target), str(folder.called))
        elif kind:
            raise BadDrafter(
                f"{folder.called} is a head for another model ({kind}), which cannot be loaded yet.",
                "It is no language model of its own: it reads what its target computes.",
                "--drafter mtp where the model brings a layer of its own, ngram, or a smaller model of the family.",
            )


def fitting(choice: DrafterChoice, target: Folder, drafters: Sequence[Folder]) -> Sequence[Folder]:
    """The folders that may draft: all, or under `auto`, which refuses no model for its drafter, none and a warning."""
    try:
        check_heads(choice, target, drafters)
    except BadDrafter as refusal:
        if not choice.auto:
            raise
        log.warning("%s", refusal.what)
        return ()
    return drafters


def head_kind(folder: Folder) -> str | None:
    """What kind of head a folder holds, by its config.json and its tensors; None for a model of its own."""
    model_type = str(folder.whole_config.get("model_type"))
    if model_type.endswith("_assistant"):
        return assistant.KIND if model_type in assistant.TYPES else "assistant"
    found = _by_name(folder)
    if found in MAYBE_EAGLE and (kind := eagle.kind_by(shapes(folder))):
        return kind
    if found in shallow.KINDS:
        return shallow.kind_by(folder.entries) or f"{found} in other parts"
    if found == "speculators: mtp":
        return mtp.KIND
    return dflash.kind_by(folder.entries) if found in MAYBE_DFLASH else found


def _by_name(folder: Folder) -> str | None:
    """What keys, classes and tensors are called, in this order."""
    config = folder.whole_config
    if found := TYPES.get(str(config.get("model_type"))):
        return found
    if found := next((kind for key, kind in SETTINGS.items() if key in config), None):
        given = config.get("speculators_model_type")
        return f"{found}: {given}" if given else found
    classes = config.get("architectures")
    names = " ".join(map(str, classes)).lower() if isinstance(classes, list) else ""
    if found := next((kind for word, kind in CLASSES.items() if word in names), None):
        return found
    begin = tuple(TENSORS)
    begun = [name for name in (one.removeprefix("model.") for one in folder.entries) if name.startswith(begin)]
    return next((kind for start, kind in TENSORS.items() if any(name.startswith(start) for name in begun)), None)


def verifier_of(folder: Folder) -> str | None:
    """The model that a head was made for, if its config.json names it."""
    given = folder.config.get("speculators_config")
    verifier = given.get("verifier") if isinstance(given, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else folder.config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def head_in_words(folder: Folder) -> str | None:
    """What head a folder holds, and for which model; None for a model of its own."""
    kind, model = head_kind(folder), verifier_of(folder)
    if kind is None:
        return None
    read = "" if kind in HEADS else ", which cannot be loaded yet"
    return f"a head that drafts{f' for {model}' if model else ''} ({kind}){read}"


def refuse_as_model(folder: Folder) -> None:
    """Raise BadModelDir for a folder that holds a head: it computes nothing without its target."""
    if words := head_in_words(folder):
        hint = f"-m {verifier_of(folder) or 'MODEL'} -d {folder.called}"
        raise BadModelDir(f"{folder.called} is no model of its own: it is {words}.", hint=hint)


def as_model(folder: Folder) -> Folder:
    """The folder of a head as that of a model of the head's layers, which is how its memory is counted."""
    kind, apart = head_kind(folder), folder.config.get("transformer_layer_config")
    if kind in dflash.KINDS.values() and isinstance(apart, dict):
        return replace(folder, config=folder.config | apart)
    if kind in shallow.KINDS:
        return replace(folder, config=folder.config | shallow.counted_as(kind, _published(folder)))
    own_name: Callable[[str], str | None]
    if kind == assistant.KIND:
        own_name, layer = assistant.own_name, assistant.layer_config(folder.config)
    elif kind in eagle.KINDS:
        own_name, layer = eagle.own_name, eagle.layer_config(folder.config, shapes(folder))
    elif kind == mtp.KIND:
        own_name, layer = mtp.own_name, mtp.layer_config(folder.config)
    else:
        return folder
    named = _named(folder, own_name).items()
    entries = {name: replace(folder.entries[published], name=name) for name, published in named}
    return replace(folder, config=folder.config | cast("dict[str, Json]", layer), entries=entries)


def tap_count(folder: Folder, hidden: int) -> int:
    """Layers of a target of this hidden size whose states a head reads; 0 for a model of its own."""
    kind = head_kind(folder)
    if kind in eagle.KINDS:
        return eagle.tap_count(shapes(folder), hidden)
    if kind in (assistant.KIND, mtp.KIND, *shallow.KINDS):
        return 1
    return dflash.tap_count(folder.config) if kind in dflash.KINDS.values() else 0


def read_layers(folder: Folder, target: Folder) -> tuple[int, ...]:
    """Layers of a target whose keys and values a head attends to; its folder is that of `as_model`."""
    if head_kind(folder) != assistant.KIND:
        return ()
    theirs = (target.config.get(key) for key in ("layer_types", "num_kv_shared_layers"))
    return assistant.read_layers(folder.config.get("layer_types"), *theirs)


def tries(folder: Folder) -> bool:
    """Whether a head finds out at first which states it is meant to read."""
    return head_kind(folder) in (*eagle.KINDS, mtp.KIND, *shallow.KINDS)


def shapes(folder: Folder) -> dict[str, tuple[int, ...]]:
    """Those of an EAGLE head's tensors, by the names they have here."""
    return {name: folder.entries[published].shape for name, published in _named(folder, eagle.own_name).items()}


def _named(folder: Folder, own_name: Callable[[str], str | None]) -> dict[str, str]:
    """The published names of its tensors by those they have here, without tensors that have none."""
    named = ((own_name(published), published) for published in folder.entries)
    return {name: published for name, published in named if name is not None}


def _published(folder: Folder) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in folder.entries.items()}


def _shape_of(target: Folder) -> TargetShape:
    layers, hidden, vocabulary = (
        found if isinstance(found := target.config.get(key), int) else 0
        for key in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    return TargetShape(layers, hidden, vocabulary)
