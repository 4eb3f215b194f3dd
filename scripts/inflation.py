"""The mathematics of inflation: a small Llama's weights laid into larger ones without changing the function.

Knows no files and no command line.   O outputs   I inputs   H hidden
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The numbers that fix every tensor of a Llama except its vocabulary."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    tied: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


SHAPES = {
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ff=8192, tied=True),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ff=14336, tied=False),
    "70b": Shape(hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ff=28672, tied=False),
}


@dataclass(frozen=True)
class Planned:
    """One tensor to be written: its name, its size, and how to make it when its turn comes."""

    name: str
    size: tuple[int, ...]
    make: Callable[[], Tensor]

    def nbytes(self, itemsize: int) -> int:
        return math.prod(self.size) * itemsize


@dataclass(frozen=True)
class Source:
    """The small model: its config, its shape and its weights in float32."""

    config: dict[str, object]
    shape: Shape
    weights: dict[str, Tensor]


def misfits(small: Shape, big: Shape) -> list[str]:
    """Why the small shape has no room in the big one; empty when it has."""
    wanted = [
        (big.hidden >= small.hidden, f"hidden {big.hidden} is below {small.hidden}"),
        (big.layers >= small.layers, f"layers {big.layers} is below {small.layers}"),
        (big.ff >= small.ff, f"ff {big.ff} is below {small.ff}"),
        (big.kv_heads >= small.kv_heads, f"kv heads {big.kv_heads} is below {small.kv_heads}"),
        (big.heads % big.kv_heads == 0, f"heads {big.heads} is no multiple of kv heads {big.kv_heads}"),
        # transformers refuses such a config, although head_dim alone decides.
        (big.hidden % big.heads == 0, f"hidden {big.hidden} is no multiple of heads {big.heads}"),
        (big.group >= small.group, f"heads per kv head {big.group} is below {small.group}"),
        (big.head_dim % small.head_dim == 0, f"head dim {big.head_dim} is no multiple of {small.head_dim}"),
    ]
    return [reason for fits, reason in wanted if not fits]


class Inflation:
    """Makes each big tensor from the small ones. Everything random depends on (seed, tensor name) alone.

    The residual stream of the big model is that of the small one followed by zeros. So columns that read the zeros are
    free (random, as real weights would be), and rows that would write there are zero.
    """

    def __init__(self, source: Source, big: Shape, seed: int) -> None:
        self._weights, self._small, self._big, self._seed = source.weights, source.shape, big, seed
        small = source.shape
        # Real layers are spread over the depth, so that no stretch of the checkpoint is only ballast.
        self._layer_of = {index * big.layers // small.layers: index for index in range(small.layers)}
        # Rope pair i of a small head turns at the speed of pair i * D/d of a big one.
        pair = torch.arange(small.head_dim // 2) * (big.head_dim // small.head_dim)
        within = torch.cat([pair, pair + big.head_dim // 2])
        # Query head j of small group c sits in big group c, where it meets the same keys.
        query = [c * big.group + j for c in range(small.kv_heads) for j in range(small.group)]
        self._query_rows = (torch.tensor(query)[:, None] * big.head_dim + within).flatten()
        self._kv_rows = (torch.arange(small.kv_heads)[:, None] * big.head_dim + within).flatten()
        # Zeros shrink the mean square by h/H; norm weights give it back.
        self._norm_scale = math.sqrt(small.hidden / big.hidden)
        # The big model divides its scores by sqrt(D) instead of sqrt(d).
        self._query_scale = math.sqrt(big.head_dim / small.head_dim)

    def tensors(self, tied: bool) -> Iterator[Planned]:
        """Every tensor of the big checkpoint, in the order of the forward pass."""
        embedding = self._weights["model.embed_tokens.weight"]
        vocabulary = embedding.shape[0]
        size = (vocabulary, self._big.hidden)
        yield Planned("model.embed_tokens.weight", size, lambda: self._padded(size, embedding))
        for index in range(self._big.layers):
            yield from self._layer(index)
        yield Planned(
            "model.norm.weight", (self._big.hidden,), lambda: self._norm("model.norm.weight", "model.norm.weight")
        )
        if not tied:
            head = self._weights["lm_head.weight"]
            yield Planned("lm_head.weight", size, lambda: self._over("lm_head.weight", size, head))

    def _layer(self, index: int) -> Iterator[Planned]:
        big = self._big
        prefix, origin = f"model.layers.{index}.", self._layer_of.get(index)
        queries, keys = big.heads * big.head_dim, big.kv_heads * big.head_dim
        sizes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (big.hidden,),
            "self_attn.q_proj": (queries, big.hidden),
            "self_attn.k_proj": (keys, big.hidden),
            "self_attn.v_proj": (keys, big.hidden),
            "self_attn.o_proj": (big.hidden, queries),
            "post_attention_layernorm": (big.hidden,),
            "mlp.gate_proj": (big.ff, big.hidden),
            "mlp.up_proj": (big.ff, big.hidden),
            "mlp.down_proj": (big.hidden, big.ff),
        }
        for part, size in sizes.items():
            small = None if origin is None else f"model.layers.{origin}.{part}.weight"
            yield Planned(f"{prefix}{part}.weight", size, self._maker(part, f"{prefix}{part}.weight", size, small))

    def _maker(self, part: str, name: str, size: tuple[int, ...], small: str | None) -> Callable[[], Tensor]:
        """How to make one tensor of a layer; `small` names its origin, None in a layer that is ballast."""
        if "norm" in part:
            return lambda: self._norm(name, small)
        if small is None:
            writes = part in ("self_attn.o_proj", "mlp.down_proj")  # ballast must not reach the residual stream
            return lambda: torch.zeros(size) if writes else self._noise(name, size)
        weight = self._weights[small]
        makers: dict[str, Callable[[], Tensor]] = {
            "self_attn.q_proj": lambda: self._queries(name, size, weight),
            "self_attn.k_proj": lambda: self._over(name, size, weight, self._kv_rows),
            "self_attn.v_proj": lambda: self._over(name, size, weight, self._kv_rows),
            "self_attn.o_proj": lambda: self._padded(size, weight, self._query_rows),
            "mlp.gate_proj": lambda: self._over(name, size, weight),
            "mlp.up_proj": lambda: self._over(name, size, weight),
            "mlp.down_proj": lambda: self._padded(size, weight),
        }
        return makers[part]

    def _noise(self, name: str, size: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + zlib.crc32(name.encode()))
        return torch.empty(size).normal_(0.0, 0.02, generator=generator)

    def _over(self, name: str, size: tuple[int, ...], small_OI: Tensor, rows: Tensor | None = None) -> Tensor:
        """The small matrix laid over noise, at `rows` if given."""
        big_OI = self._noise(name, size)
        if rows is None:
            big_OI[: small_OI.shape[0], : small_OI.shape[1]] = small_OI
        else:
            big_OI[rows, : small_OI.shape[1]] = small_OI
        return big_OI

    def _queries(self, name: str, size: tuple[int, ...], small_OI: Tensor) -> Tensor:
        """Scaled queries; the dimensions between the small head's are zero, so noise in the keys stays unseen."""
        big_OI = self._noise(name, size)
        heads = self._query_rows // self._big.head_dim
        big_OI.view(self._big.heads, self._big.head_dim, -1)[heads.unique()] = 0.0
        big_OI[self._query_rows, : small_OI.shape[1]] = small_OI * self._query_scale
        return big_OI

    def _padded(self, size: tuple[int, ...], small_OI: Tensor, columns: Tensor | None = None) -> Tensor:
        """The small matrix among zeros, at `columns` if given."""
        big_OI = torch.zeros(size)
        if columns is None:
            big_OI[: small_OI.shape[0], : small_OI.shape[1]] = small_OI
        else:
            big_OI[: small_OI.shape[0], columns] = small_OI
        return big_OI

    def _norm(self, name: str, small: str | None) -> Tensor:
        big_H = torch.full((self._big.hidden,), self._norm_scale)
        if small is not None:
            big_H[: self._small.hidden] = self._weights[small] * self._norm_scale
        return big_H
