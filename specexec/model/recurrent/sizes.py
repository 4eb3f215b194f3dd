"""Memory of recurrent states, from config.json alone. Knows no torch; `plan` uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specexec.sizes import CHUNK, SELECTIVE_STATES, TRIANGLE

F32_B = 4
GROUPS = {"nemotron_h": 8, "mamba2": 8}  # that heads of Mamba-2 form, where a config does not say
NAMES = frozenset(("linear_attention", "mamba", "conv", "hybrid", "M"))  # of recurrent layers, in config.json


@dataclass(frozen=True)
class LayerSizes:
    """One recurrent layer; nothing but channels and taps where it only convolves.

    `state`, `node`: numbers in float32 that it keeps of a text and of one node, beside the convolution's inputs.
    `heads`: those whose nodes meet in a triangle. `row_B`, `most_B`: bytes that are there for each row while states
    are read, and for all of them together at most.
    """

    channels: int
    taps: int
    state: int = 0
    node: int = 0
    heads: int = 0
    row_B: int = 0
    most_B: int = 0

    def text_B(self, item_B: int) -> int:
        """Its state after a text, and the last inputs of the convolution."""
        return (self.taps - 1) * self.channels * item_B + self.state * F32_B

    def node_B(self, item_B: int) -> int:
        """What it keeps of one node, the convolution's input included."""
        return self.channels * item_B + self.node * F32_B


@dataclass(frozen=True)
class Recurrences:
    """The recurrent layers of a model that can branch, by number; none for other models."""

    layers: Mapping[int, LayerSizes]

    def text_B(self, item_B: int) -> int:
        """All states after one text."""
        return sum(layer.text_B(item_B) for layer in self.layers.values())

    def node_B(self, item_B: int) -> int:
        """What all of them keep of one node."""
        return sum(layer.node_B(item_B) for layer in self.layers.values())


def recurrences_of(config: Mapping[str, object]) -> Recurrences:
    """Read from a config.json, as a model of its type would be; never fewer layers than it has."""
    number = _Numbers(config)
    numbers: Sequence[int] = range(number("num_hidden_layers", 0))
    match config.get("model_type"):
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text":
            layer, every = _delta_rule(number), number("full_attention_interval", 4)
            numbers = [at for at in numbers if (at + 1) % every]
        case "olmo_hybrid":
            layer = _delta_rule(number)
        case "lfm2" | "lfm2_moe" | "lfm3":
            taps = number("conv_L_cache", 7 if number.model_type == "lfm3" else 3)
            layer = LayerSizes(number("hidden_size", 2560), taps)
        case "bamba" | "granitemoehybrid" | "falcon_h1":
            layer = _mamba2(number, number("mamba_n_heads", 128), number("mamba_d_state", 256))
        case "nemotron_h":
            layer = _mamba2(number, number("mamba_num_heads", 128), number("ssm_state_size", 128))
        case "mamba2":
            layer = _mamba2(number, number("num_heads", 128), number("state_size", 128))
        case "zamba2":
            layer = _mamba2(number, number("n_mamba_heads", 8), number("mamba_d_state", 64))
        case "kimi_linear" | "bailing_hybrid":
            layer = _kimi_delta(number)
            if isinstance(given := config.get("linear_attn_config"), Mapping) and (counted := given.get("kda_layers")):
                numbers = [at - 1 for at in counted]
        case "mamba" | "falcon_mamba":
            channels = number("intermediate_size", number("expand", 2) * number("hidden_size", 768))
            layer = _mamba1(channels, number("state_size", 16), number("conv_kernel", 4))
        case "jamba":
            channels = number("mamba_expand", 2) * number("hidden_size", 4096)
            layer = _mamba1(channels, number("mamba_d_state", 16), number("mamba_d_conv", 4))
            offset = number("attn_layer_offset", 4) if config.get("attn_layer_offset") != 0 else 0
            numbers = [at for at in numbers if at not in range(offset, len(numbers), number("attn_layer_period", 8))]
        case "deepseek_v4":
            return Recurrences(_blocks(number))
        case _:
            return Recurrences({})
    if isinstance(attending := config.get("attn_layer_indices"), list):
        numbers = [at for at in numbers if at not in attending]
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        if isinstance(types := config.get(name), list | str):
            numbers = [at for at, kind in enumerate(types) if kind in NAMES]
    return Recurrences(dict.fromkeys(numbers, layer))


@dataclass(frozen=True)
class _Numbers:
    """Numbers of a config; a default where one is absent."""

    config: Mapping[str, object]

    @property
    def model_type(self) -> str:
        """The name of the architecture."""
        return str(self.config.get("model_type"))

    def __call__(self, name: str, default: int) -> int:
        value = self.config.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _delta_rule(number: _Numbers) -> LayerSizes:
    heads, key_heads = number("linear_num_value_heads", 32), number("linear_num_key_heads", 16)
    key, value = number("linear_key_head_dim", 128), number("linear_value_head_dim", 128)
    if number.model_type == "olmo_hybrid":
        attending = number("num_attention_heads", 30)
        heads, key_heads = number("linear_num_value_heads", attending), number("linear_num_key_heads", attending)
        key = number("linear_key_head_dim", 3 * number("hidden_size", 3840) // (4 * key_heads))
        value = number("linear_value_head_dim", 2 * key)
    channels = 2 * key_heads * key + heads * value
    return _by_head(channels, number("linear_conv_kernel_dim", 4), heads, key_heads, key, value)


def _by_head(channels: int, taps: int, heads: int, key_heads: int, key: int, value: int) -> LayerSizes:
    """A matrix a head; of a node its key, what it writes and, in float64, the sum of its decays."""
    return LayerSizes(channels, taps, heads * key * value, key_heads * key + heads * value + 2 * heads, heads)


def _mamba2(number: _Numbers, heads: int, state: int) -> LayerSizes:
    groups = number("mamba_n_groups", number("mamba_ngroups", number("n_groups", GROUPS.get(number.model_type, 1))))
    inner = number("mamba_d_ssm", number("mamba_expand", number("expand", 2)) * number("hidden_size", 4096))
    widths = ("mamba_head_dim", "mamba_d_head", *(("head_dim",) if number.model_type == "mamba2" else ()))
    width = next((found for name in widths if (found := number(name, 0))), inner // heads)
    taps = number("mamba_d_conv", number("conv_kernel", 4))
    return _by_head(heads * width + 2 * groups * state, taps, heads, groups, state, width)


def _kimi_delta(number: _Numbers) -> LayerSizes:
    """A matrix a head; of a node its key, the decay of each channel of it, and what it writes."""
    if number.model_type == "bailing_hybrid":
        heads, taps = number("num_attention_heads", 32), number("short_conv_kernel_size", 4)
        width = number("linear_head_dim", number("head_dim", 128))
    else:
        given = number.config.get("linear_attn_config")
        nested = _Numbers(given if isinstance(given, Mapping) else {})
        heads = nested("num_heads", number("linear_num_heads", 32))
        width = nested("head_dim", number("linear_head_dim", 128))
        taps = nested("short_conv_kernel_size", number("linear_conv_kernel_dim", 4))
    size = heads * width
    given_B, met_B = 5 * size * F32_B, 16 * size * F32_B  # what a layer gives, and what is met on the way up
    most_B = CHUNK * given_B + TRIANGLE * met_B
    return LayerSizes(3 * size, taps, size * width, 3 * size, heads, given_B + met_B, most_B)


def _blocks(number: _Numbers) -> dict[int, LayerSizes]:
    """Tokens of an open block, and where an index chooses among blocks, those of the block before it."""
    given, ratios = (number.config.get(name) for name in ("compress_rates", "compress_ratios"))
    rates = _Numbers(given if isinstance(given, Mapping) else {})
    few, many = (
        rates(f"{name}_attention", number(f"compress_rate_{short}", default))
        for name, short, default in (("compressed_sparse", "csa", 4), ("heavily_compressed", "hca", 128))
    )
    head = number("head_dim", 512)
    chosen = LayerSizes(4 * (head + number("index_head_dim", 128)), 2 * few)
    all_seen = LayerSizes(2 * head, many)
    kinds = {"compressed_sparse_attention": chosen, "heavily_compressed_attention": all_seen, 4: chosen, 128: all_seen}
    types = number.config.get("layer_types") or ratios
    if isinstance(types, list):
        return {at: kinds[kind] for at, kind in enumerate(types) if kind in kinds}
    half = number("num_hidden_layers", 43) // 2
    return dict(enumerate((all_seen,) * (half + 2) + (chosen,) * half))


def _mamba1(channels: int, states: int, taps: int) -> LayerSizes:
    """Some numbers a channel, and the rates at which they decay; of a node its step, what it writes and its key."""
    numbers = channels * states
    given_B, states_B = 12 * channels * F32_B, 2 * numbers * F32_B  # what is made of a row on its way, and its states
    most_B = CHUNK * given_B + 2 * SELECTIVE_STATES * F32_B
    return LayerSizes(channels, taps, 2 * numbers, 2 * channels + states, 0, given_B + states_B, most_B)
