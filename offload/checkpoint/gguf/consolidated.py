"""Mistral's own layout (consolidated.safetensors beside params.json): its config, its names in transformers. No torch.

Rows of queries and keys lie with the two halves of each head in turns, as in GGUF files of Llama. Refuses by name what
params.json says beyond a plain decoder: experts, images, low ranks, scaled positions, few bits.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from offload.checkpoint.documents import Json
from offload.checkpoint.entry import Entry, Strides
from offload.errors import BadModelDir, UnsupportedModel

PARAMS, TEKKEN = "params.json", "tekken.json"
FILE = re.compile(r"consolidated(-\d{5}-of-\d{5})?\.safetensors")
NEEDED = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
FRACTIONS = ("norm_eps", "rope_theta")  # the others are counted
SOMETIMES = ("rope_theta", "sliding_window")
# What a plain decoder may say besides, and what says nothing of its weights.
OTHERS = (
    "rope_theta", "sliding_window", "max_seq_len", "max_position_embeddings", "tied_embeddings", "use_biases", "causal",
    "model_type", "max_batch_size", "dtype",
)  # fmt: skip
OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
HINT = "the same model in transformers' format (model*.safetensors, config.json), or as a GGUF file."


def config_of(params: Mapping[str, Json], where: str) -> dict[str, Json]:
    """What config.json of the same model would say. Raises UnsupportedModel, BadModelDir."""
    strange = [name for name, given in params.items() if name not in (*NEEDED, *OTHERS) and given not in (None, False)]
    strange += [name for name in ("use_biases",) if params.get(name)]
    if strange or params.get("causal", True) is not True:
        named = ", ".join(strange) or "causal"
        raise UnsupportedModel(f"{where} says more than is read of this layout ({named}).", None, HINT)
    for name in (*NEEDED, *(name for name in SOMETIMES if params.get(name) is not None)):
        given = params.get(name)
        kinds = (int, float) if name in FRACTIONS else (int,)
        if type(given) not in kinds or not isinstance(given, int | float) or not 0 < given < 1 << 31:
            raise BadModelDir(f"{where} does not describe a usable model: {name} is {given!r}.", None, HINT)
    window, longest = params.get("sliding_window"), params.get("max_position_embeddings", params.get("max_seq_len"))
    config: dict[str, Json] = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "head_dim": params["head_dim"],
        "intermediate_size": params["hidden_dim"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": params["norm_eps"],
        "vocab_size": params["vocab_size"],
        "rope_parameters": {"rope_type": "default", "rope_theta": params.get("rope_theta") or 10000.0},
        "sliding_window": window,
        "max_position_embeddings": longest if isinstance(longest, int) and longest > 0 else 32768,
        "tie_word_embeddings": params.get("tied_embeddings") is True,
    }
    return config


def renamed(entries: Mapping[str, Entry], config: Mapping[str, Json]) -> Iterator[Entry]:
    """Every tensor under the name of a transformers checkpoint. Raises UnsupportedModel for others."""
    heads = {"attention.wq": config["num_attention_heads"], "attention.wk": config["num_key_value_heads"]}
    for name, entry in entries.items():
        first, _, rest = name.partition(".")
        layer, _, inside = rest.partition(".")
        path = inside.removesuffix(".weight") if first == "layers" else name.removesuffix(".weight")
        known = INSIDE.get(path) if first == "layers" and layer.isdecimal() else OUTSIDE.get(path)
        if known is None or not name.endswith(".weight"):
            raise UnsupportedModel(f"{entry.file} holds the tensor '{name}', which is not known here.", None, HINT)
        target = f"model.layers.{layer}.{known}.weight" if first == "layers" else f"{known}.weight"
        count = heads.get(path)
        if count is None:
            yield replace(entry, name=target)
            continue
        assert isinstance(count, int)
        if len(entry.shape) != 2 or not entry.nbytes or entry.shape[0] % (2 * count):
            raise BadModelDir(f"'{name}' is {list(entry.shape)}, and params.json speaks of {count} heads.", None, HINT)
        place = Strides.all_of(*entry.shape).split(0, count, 2).swapped(1, 2)
        yield replace(entry, name=place.behind(target), shape=place.sizes)
