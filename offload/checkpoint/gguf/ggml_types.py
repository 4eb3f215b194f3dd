"""The types in which ggml stores tensors: how many items make a block, and its bytes. Knows no file and no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """One type by ggml's name; `plain` is its dtype in a safetensors file, None where items come in blocks."""

    name: str
    items: int
    nbytes: int
    plain: str | None = None


# By the numbers of ggml.h.
GGML_TYPES = {
    0: GgmlType("F32", 1, 4, "F32"),
    1: GgmlType("F16", 1, 2, "F16"),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    20: GgmlType("IQ4_NL", 32, 18),
    23: GgmlType("IQ4_XS", 256, 136),
    30: GgmlType("BF16", 1, 2, "BF16"),
    39: GgmlType("MXFP4", 32, 17),
}
BY_NAME = {one.name: one for one in GGML_TYPES.values()}
