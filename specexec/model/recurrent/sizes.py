"""Memory of recurrent states, from config.json alone. Knows no torch; `plan` uses it.

C channels of a convolution   K taps of its filter   H heads   J heads of keys
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

F32_B, F64_B = 4, 8


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
    match config.get("model_type"):
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text" | "olmo_hybrid":
            layer = _delta_rule(number)
        case _:
            return Recurrences(())
    count = number("num_hidden_layers", 0)
    types = config.get("layer_types")
    if isinstance(types, list):
        count = types[:count].count("linear_attention")
    elif config["model_type"] != "olmo_hybrid":
        count -= count // number("full_attention_interval", 4)
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
