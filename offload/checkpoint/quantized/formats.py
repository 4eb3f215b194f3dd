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
# By scheme, which is what `Quantised.scheme` says.
STORED_FORMATS = {
    "nf4": StoredFormat("bitsandbytes", f"{_HERE}.stored:find_4bit", f"{_HERE}.quantize:dequantise_4bit", "nf4"),
    "fp4": StoredFormat("bitsandbytes", f"{_HERE}.stored:find_4bit", f"{_HERE}.quantize:dequantise_4bit", "nf4"),
    "int8": StoredFormat("bitsandbytes", f"{_HERE}.stored:find_int8", f"{_HERE}.quantize:dequantise_int8", "int8"),
    "mxfp4": StoredFormat("mxfp4", f"{_HERE}.stored:find_mxfp4", f"{_HERE}.quantize:dequantise_mxfp4", "mxfp4"),
}
# What config.json may name; the tensors themselves say the rest.
METHODS = ("specexec", *dict.fromkeys(one.method for one in STORED_FORMATS.values()))
