"""A Llama of any shape in bitsandbytes' four bits whose files are holes: real sizes and names, nothing but zeros.

For measuring how fast weights travel and multiply; what it computes is nonsense.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from inflation import Shape

from offload.checkpoint.quantized.quantize import BLOCK, NESTED_BLOCK, STATE_B, bitsandbytes

Tensors = Iterator[tuple[str, str, tuple[int, ...], bytes | None]]


def linears_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's matrices."""
    own, shared = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (own, shape.hidden),
        "self_attn.k_proj": (shared, shape.hidden),
        "self_attn.v_proj": (shared, shape.hidden),
        "self_attn.o_proj": (shape.hidden, own),
        "mlp.gate_proj": (shape.ff, shape.hidden),
        "mlp.up_proj": (shape.ff, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ff),
    }


def weights_of(shape: Shape) -> float:
    """How many there are in all layers."""
    return float(shape.layers * sum(math.prod(size) for size in linears_of(shape).values()))


def write_sparse(folder: Path, shape: Shape, vocabulary: int) -> None:
    """Write config.json and one file for each layer and one for the rest, as transformers would name them."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.ff, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    files = [("rest.safetensors", _rest(shape, vocabulary))]
    files += [(f"layer-{number:03}.safetensors", _layer(shape, number)) for number in range(shape.layers)]
    weight_map: dict[str, str] = {}
    for name, tensors in files:
        weight_map |= dict.fromkeys(_write(folder / name, tensors), name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _rest(shape: Shape, vocabulary: int) -> Tensors:
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", "BF16", (vocabulary, shape.hidden), None
    yield "model.norm.weight", "BF16", (shape.hidden,), None


def _layer(shape: Shape, number: int) -> Tensors:
    values = bitsandbytes().get_4bit_type("nf4", device="cpu").numpy().tobytes()
    steps = bitsandbytes().create_dynamic_map().numpy().tobytes()
    base = f"model.layers.{number}"
    for name, (O, I) in linears_of(shape).items():
        weight, blocks = f"{base}.{name}.weight", O * I // BLOCK
        yield weight, "U8", (O * I // 2, 1), None
        yield f"{weight}.absmax", "U8", (blocks,), None
        yield f"{weight}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),), None
        yield f"{weight}.quant_map", "F32", (16,), values
        yield f"{weight}.nested_quant_map", "F32", (256,), steps
        state = {
            "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [O, I],
            "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0,
        }  # fmt: skip
        text = json.dumps(state).encode()
        text += b" " * (-len(text) % STATE_B)
        yield f"{weight}.quant_state.bitsandbytes__nf4", "U8", (len(text),), text
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{base}.{name}.weight", "BF16", (shape.hidden,), None


def _write(file: Path, tensors: Tensors) -> list[str]:
    """A safetensors file that is a hole wherever no bytes are given."""
    sizes = {"BF16": torch.bfloat16.itemsize, "F32": torch.float32.itemsize, "U8": torch.uint8.itemsize}
    header, filled, at = dict[str, object](), list[tuple[int, bytes]](), 0
    for name, dtype, shape, content in sorted(tensors, key=lambda one: -sizes[one[1]]):  # aligned by their items
        end = at + math.prod(shape) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        if content is not None:
            filled.append((at, content))
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)  # data begin at a page
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + at)
        for start, content in filled:
            os.pwrite(out.fileno(), content, 8 + len(text) + start)
    return list(header)
