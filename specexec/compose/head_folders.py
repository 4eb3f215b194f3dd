"""Heads that draft: whether one came with a target, and folders that hold one instead of a model. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from offload import is_quantised, mtp_names
from specexec.errors import BadDrafter

if TYPE_CHECKING:
    from offload import Folder
    from specexec.drafters.registry import DrafterChoice

# What class names, in lower case, say.
CLASSES = {"dflash": "DFlash", "eagle": "EAGLE", "speculator": "speculators", "medusa": "Medusa"}
# And what keys of config.json and tensors that no language model has.
SETTINGS = {"speculators_model_type": "speculators", "dflash_config": "DFlash", "medusa_num_heads": "Medusa"}
LOADED = ("DFlash",)  # from a folder of their own
# What its config.json says of its target, which shares embeddings and head.
SIZES = {"num_target_layers": "layers", "hidden_size": "hidden numbers", "vocab_size": "tokens"}
TENSORS = {"d2t": "EAGLE-3", "midlayer.": "EAGLE-3", "fc.weight": "EAGLE", "rnn_u": "ReDrafter", "speculator.": "MLP"}


def check_heads(choice: DrafterChoice, target: Folder, drafters: Iterable[Folder]) -> None:
    """Raises BadDrafter where the target lacks the layer that is asked for, or a folder is a head of no use here."""
    if "mtp" in choice.sources and not mtp_names(target):
        known = "stored in a way that is not read yet" if target.mtp else "its files hold no such layer"
        raise BadDrafter(
            f"--drafter mtp needs a layer of {target.called} that guesses further ahead: {known}.",
            "DeepSeek-V3, GLM-4.5, Qwen3-Next, Qwen3.5 and later ones have them; converted copies often lost them.",
            "--drafter ngram, a smaller model of the same family, or the publisher's own version of the model.",
        )
    for folder in drafters:
        kind = head_kind(folder)
        if kind in LOADED and is_quantised(folder):
            raise BadDrafter(
                f"{folder.called} is a {kind} head in few bits, which cannot be loaded yet.",
                hint="the head as it was published in 16 bits.",
            )
        for key, words in SIZES.items():
            told, ours = folder.config.get(key), target.config.get(key.replace("num_target", "num_hidden"))
            if kind in LOADED and told is not None and told != ours:
                raise BadDrafter(
                    f"{folder.called} is a {kind} head for a model with {told} {words}, this one has {ours}.",
                    hint="the head of this model, --drafter ngram, or a smaller model of the same family.",
                )
        if kind and kind not in LOADED:
            raise BadDrafter(
                f"{folder.called} is a head for another model ({kind}), which cannot be loaded yet.",
                "It is no language model of its own: it reads what its target computes.",
                "--drafter mtp where the model brings a layer of its own, ngram, or a smaller model of the family.",
            )


def head_kind(folder: Folder) -> str | None:
    """What kind of head a folder holds, by its config.json and its tensors; None for a model of its own."""
    config = folder.whole_config
    if str(config.get("model_type")).endswith("_assistant"):
        return "assistant"
    if found := next((kind for key, kind in SETTINGS.items() if key in config), None):
        told = config.get("speculators_model_type")
        return f"{found}: {told}" if told else found
    classes = config.get("architectures")
    names = " ".join(map(str, classes)).lower() if isinstance(classes, list) else ""
    if found := next((kind for word, kind in CLASSES.items() if word in names), None):
        return found
    starts = {name.removeprefix("model.") for name in folder.entries}
    return next((kind for start, kind in TENSORS.items() if any(name.startswith(start) for name in starts)), None)


def tap_count(folder: Folder) -> int:
    """Layers of the target whose hidden states a head reads; 0 for a model of its own."""
    told = folder.config.get("dflash_config") if head_kind(folder) in LOADED else None
    ids = told.get("target_layer_ids") if isinstance(told, dict) else None
    return len(ids) if isinstance(ids, list) else 0
