"""Memory of recurrent states, from config.json alone. Knows no torch; `plan` uses it.

C channels of a convolution   K taps of its filter   H heads   J heads of keys
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

F32_B, F64_B = 4, 8
NAMES = frozenset(("linear_attention", "mamba", "conv", "hybrid", "M"))  # of recurrent layers, in config.json


@dataclass(frozen=True)
class LayerSizes:
    """One recurrent layer; no heads where it only convolves."""

    channels: int
    taps: int
    heads: int = 0
    key_heads: int = 0
    key: int = 0
    value: int = 0

    def text_B(self, item_B: int) -> int:
        """Its state after a text: the last inputs of the convolution, and a matrix for each head in float32."""
        return (self.taps - 1) * self.channels * item_B + self.heads * self.key * self.value * F32_B

    def node_B(self, item_B: int) -> int:
        """What it keeps of one node: the convolution's input; key, what is written and the sum of decays."""
        numbers = self.key_heads * self.key + self.heads * self.value
        return self.channels * item_B + numbers * F32_B + self.heads * F64_B


@dataclass(frozen=True)
class Recurrences:
    """The recurrent layers of a model that can branch; none for other models."""

    layers: tuple[LayerSizes, ...]

    def text_B(self, item_B: int) -> int:
        """All states after one text."""
        return sum(layer.text_B(item_B) for layer in self.layers)

    def node_B(self, item_B: int) -> int:
        """What all of them keep of one node."""
        return sum(layer.node_B(item_B) for layer in self.layers)


def recurrences_of(config: Mapping[str, object]) -> Recurrences:
    """Read from a config.json, as a model of its type would be; never fewer layers than it has."""
    number = _Numbers(config)
    count = number("num_hidden_layers", 0)
    match config.get("model_type"):
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text":
            layer = _delta_rule(number)
            count -= count // number("full_attention_interval", 4)
        case "olmo_hybrid":
            layer = _delta_rule(number)
        case "lfm2" | "lfm2_moe":
            layer = LayerSizes(number("hidden_size", 2560), number("conv_L_cache", 3))
        case "bamba" | "granitemoehybrid" | "falcon_h1":
            layer = _mamba2(number, number("mamba_n_heads", 128), number("mamba_d_state", 256))
        case "nemotron_h":
            layer = _mamba2(number, number("mamba_num_heads", 128), number("ssm_state_size", 128))
        case _:
            return Recurrences(())
    if isinstance(attending := config.get("attn_layer_indices"), list):
        count -= len(attending)
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        if isinstance(types := config.get(name), list | str):
            count = sum(kind in NAMES for kind in types)
    return Recurrences((layer,) * count)


@dataclass(frozen=True)
class _Numbers:
    """Numbers of a config; a default where one is absent."""

    config: Mapping[str, object]

    def __call__(self, name: str, default: int) -> int:
        value = self.config.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _delta_rule(number: _Numbers) -> LayerSizes:
    heads, key_heads = number("linear_num_value_heads", 32), number("linear_num_key_heads", 16)
    key, value = number("linear_key_head_dim", 128), number("linear_value_head_dim", 128)
    if number.config["model_type"] == "olmo_hybrid":
        attending = number("num_attention_heads", 30)
        heads, key_heads = number("linear_num_value_heads", attending), number("linear_num_key_heads", attending)
        key = number("linear_key_head_dim", 3 * number("hidden_size", 3840) // (4 * key_heads))
        value = number("linear_value_head_dim", 2 * key)
    channels = 2 * key_heads * key + heads * value
    return LayerSizes(channels, number("linear_conv_kernel_dim", 4), heads, key_heads, key, value)


def _mamba2(number: _Numbers, heads: int, state: int) -> LayerSizes:
    groups = number("mamba_n_groups", number("n_groups", 8 if number.config["model_type"] == "nemotron_h" else 1))
    inner = number("mamba_d_ssm", number("mamba_expand", 2) * number("hidden_size", 4096))
    width = number("mamba_head_dim", number("mamba_d_head", inner // heads))
    taps = number("mamba_d_conv", number("conv_kernel", 4))
    return LayerSizes(heads * width + 2 * groups * state, taps, heads, groups, state, width)
