"""What a folder says of a DFlash head, in the spellings of z-lab and of `speculators`. Knows no torch.

z-lab keeps the layers' settings all around and its own in `dflash_config`; `speculators` keeps the layers' apart, in
`transformer_layer_config`. x_j is what flows into layer j of the target.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

from specexec.drafters.heads.refusal import TargetShape, of_another, unread

KINDS = {"dflash": "DFlash", "dflash2": "DFlash-2", "dspark": "DSpark"}  # as `speculators` calls them
SELECTOR, MARKOV = "candidate_selector.", "markov_head."
ONLY_TRAINING = ("verifier_norm.", "verifier_lm_head.", "rotary_emb.", "confidence_head.")


def kind_by(names: Collection[str]) -> str:
    """DFlash, or what its sequential part makes it, by the names of its tensors."""
    for start, kind in ((SELECTOR, "DFlash-2"), (MARKOV, "DSpark")):
        if any(name.removeprefix("model.").startswith(start) for name in names):
            return kind
    return "DFlash"


def tap_count(settings: Mapping[str, object]) -> int:
    """Hidden states that a head reads of each token."""
    given = settings.get("dflash_config")
    own = {**settings, **(given if isinstance(given, Mapping) else {})}
    ids = own.get("aux_hidden_state_layer_ids", own.get("target_layer_ids"))
    return len(ids) if isinstance(ids, list) else 0


@dataclass(frozen=True)
class DFlashFields:
    """One head. `layer`: settings of its layers, of Qwen3's kind. `taps`: x_j, in the order in which fc reads them.

    Embeddings are multiplied by `scale`, logits by `multiplier` and then held within `softcap`, if there is one.
    """

    kind: str
    layer: Mapping[str, object]
    block: int
    mask: int
    taps: tuple[int, ...]
    scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None
    from_anchor: bool = False
    """Whether the last token of the text guesses, too: the block then has a place more."""
    causal: bool | None = None
    """Whether a place sees earlier ones of the block alone; None: in layers that have a window."""
    window_of_block: bool = False
    """Whether a window counts from the block's beginning, for all its places, and not from each of them."""
    kernel: int = 0
    group: int = 0
    """Tokens and neighbours of the convolutions around attention and MLP; 0: there are none."""
    markov: Literal["vanilla", "gated", "rnn"] = "vanilla"
    best: int = 16
    """Candidates that a selector compares."""

    @property
    def places(self) -> int:
        """Tokens that a block guesses."""
        return self.block if self.from_anchor else self.block - 1

    @classmethod
    def of(cls, settings: Mapping[str, object], names: Collection[str], name: str) -> DFlashFields:
        """`names` are those of its tensors. Raises BadDrafter, by name, for what is missing or not understood."""
        kind, apart = kind_by(names), settings.get("transformer_layer_config")
        ours = isinstance(apart, Mapping)
        given = settings.get("dflash_config")
        own = {**settings, **(given if isinstance(given, Mapping) else {})}
        layer = {**(apart if isinstance(apart, Mapping) else settings)}
        refused = partial(unread, kind, name)
        layers_key = "aux_hidden_state_layer_ids" if ours else "target_layer_ids"
        block, mask, ids = (own.get(key) for key in ("block_size", "mask_token_id", layers_key))
        if type(block) is not int or type(mask) is not int or not isinstance(ids, list) or block < 2:
            raise refused(f"its config.json lacks block_size, mask_token_id or {layers_key}")
        if layer.get("model_type", "qwen3") not in ("qwen3", *(["llama"] if ours else [])):
            raise refused(f"its layers are those of {layer.get('model_type')!r}")
        if not ids or any(type(one) is not int or one < 0 for one in ids):
            raise refused(f"its {layers_key} are {ids}")
        try:
            scale, multiplier, softcap = (
                float(cast("float", own.get(key) or usual))
                for key, usual in (
                    ("input_embedding_scale", 1.0), ("output_multiplier", 1.0), ("final_logit_softcapping", 0.0)
                )
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise refused(f"its config.json makes no sense ({error})") from error
        kernel, group = (own.get(key, 0) for key in ("conv_kernel_size", "conv_group_size"))
        if type(kernel) is not int or type(group) is not int or min(kernel, group) < (kind == "DFlash-2"):
            raise refused(f"its conv_kernel_size and conv_group_size are {kernel!r} and {group!r}")
        markov, best = own.get("markov_head_type", "vanilla"), own.get("selector_top_k", 16)
        if markov not in ("vanilla", "gated", "rnn") or type(best) is not int or best < 1:
            raise refused(f"its markov_head_type and selector_top_k are {markov!r} and {best!r}")
        causal = layer.get("is_causal")
        if ours:
            causal = False if own.get("sliding_window_non_causal", kind == "DFlash-2") else None
            rope = layer.get("rope_parameters")
            if isinstance(rope, Mapping) and "sliding_attention" in rope:  # as `speculators` takes them
                layer["rope_parameters"] = rope["sliding_attention"]
        return cls(
            kind, layer | {"model_type": "qwen3"}, block, mask, tuple(ids if ours else (one + 1 for one in ids)),
            scale, multiplier, softcap or None, bool(own.get("sample_from_anchor", ours and kind == "DSpark")),
            None if causal is None else bool(causal), ours, kernel, group, markov, best,
        )  # fmt: skip

    def check(self, settings: Mapping[str, object], target: TargetShape, name: str) -> None:
        """Raises BadDrafter for a head that was made for a model of other sizes."""
        sizes = {
            "layers": (settings.get("num_target_layers"), target.layers),
            "hidden numbers": (self.layer.get("hidden_size"), target.hidden),
            "tokens": (self.layer.get("vocab_size"), target.vocabulary),
        }
        for words, (given, ours) in sizes.items():
            if given is not None and given != ours:
                raise of_another(self.kind, name, given, ours, words)
        if max(self.taps) > target.layers:
            raise of_another(self.kind, name, f"{max(self.taps)} or more", target.layers, "layers")
