"""What a folder says of an MTP layer of its own, as `speculators` writes one. Knows no torch.

config.json has the layer's settings apart, in `transformer_layer_config`; tensors lie below `mtp_layers.0.`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from specexec.drafters.heads.refusal import TargetShape, of_another, unread

KIND, PUBLISHED, START = "MTP", "mtp_layers.", "layers."
LAYERS = ("qwen3",)
_ONLY_TRAINING = ("verifier_norm.", "verifier_lm_head.", "rotary_emb.", "embed_tokens.", "lm_head.", "t2d", "d2t")


def own_name(name: str) -> str | None:
    """The name that a published tensor has here; None for what repeats the target's or only training uses."""
    name = name.removeprefix("model.")
    if name.startswith(PUBLISHED):
        name = START + name.removeprefix(PUBLISHED)
    return None if name.startswith(_ONLY_TRAINING) else name


def layer_config(settings: Mapping[str, object]) -> dict[str, object]:
    """The config.json of a model of this one layer, which sees the whole text."""
    apart = settings.get("transformer_layer_config")
    own = dict(apart) if isinstance(apart, Mapping) else {}
    return own | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


def check(settings: Mapping[str, object], names: Collection[str], target: TargetShape, name: str) -> None:
    """Raises BadDrafter, by name, for another kind of layer, several of them, or a model of other sizes."""
    layer = layer_config(settings)
    if layer.get("model_type") not in LAYERS:
        raise unread(KIND, name, f"its layer is one of {layer.get('model_type')!r}, not of Qwen3's kind")
    if odd := sorted(one for one in names if not one.startswith(f"{START}0.")):
        raise unread(KIND, name, f"'{odd[0]}' is a part that is not known")
    sizes = {"hidden_size": (target.hidden, "hidden numbers"), "vocab_size": (target.vocabulary, "tokens")}
    for key, (ours, words) in sizes.items():
        if layer.get(key) != ours:
            raise of_another(KIND, name, layer.get(key), ours, words)
