"""The quantised formats that can be read, one line each. Knows no tensor, no file and no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredFormat:
    """One way to store a weight in few bits.

    `method` is what config.json calls it. `find` and `dequantise` are "module:function", imported when they are needed:
    `find(folder)` yields a `Quantised` for each weight, `dequantise(weight, members, target)` fills a dense tensor from
    its members by role. `speed` is the scheme that its dequantisation is about as fast as, for `plan`.
    """

    method: str
    find: str
    dequantise: str
    speed: str


_HERE = "offload.checkpoint.quantized"
# Floats of GGUF files, where a converter changed their values or their order.
FLOAT_SCHEMES = ("f32", "f16", "bf16")
# ggml's types by what they cost. MXFP4 has another name here: gpt-oss' own files hold it in another layout.
_GGML = {
    "nf4": ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "ggml_mxfp4"),
    "int8": ("q8_0", *FLOAT_SCHEMES),
}
# By scheme, which is what `Quantised.scheme` says.
STORED_FORMATS = {
    **{
        kind: StoredFormat("gguf", f"{_HERE}.gguf:find", f"{_HERE}.gguf:dequantise", speed)
        for speed, kinds in _GGML.items()
        for kind in kinds
    },
    "nf4": StoredFormat("bitsandbytes", f"{_HERE}.stored:find_4bit", f"{_HERE}.quantize:dequantise_4bit", "nf4"),
    "fp4": StoredFormat("bitsandbytes", f"{_HERE}.stored:find_4bit", f"{_HERE}.quantize:dequantise_4bit", "nf4"),
    "int8": StoredFormat("bitsandbytes", f"{_HERE}.stored:find_int8", f"{_HERE}.quantize:dequantise_int8", "int8"),
    "mxfp4": StoredFormat("mxfp4", f"{_HERE}.stored:find_mxfp4", f"{_HERE}.quantize:dequantise_mxfp4", "mxfp4"),
}
# What config.json may name; the tensors themselves say the rest.
METHODS = ("specexec", *dict.fromkeys(one.method for one in STORED_FORMATS.values()))
