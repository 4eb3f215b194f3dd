"""The one source of randomness: Gumbel noise keyed by (seed, position, token id) and nothing else.

The token at position i is argmax(logits + T * G(seed, i, token)): an exact sample of softmax(logits / T), and a pure
function of text and seed. The drafter may look at the same noise (Daliri, Musco, Ramesh 2024, "Coupling without
communication and drafter-invariant speculative decoding"). Bits come from Philox 4x64-10 (Salmon et al. 2011): key
(seed, position), counter (token // 4), lane (token % 4).   V vocabulary   P positions   K ids
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


class Noise:
    """G(seed, position, token) for one sequence, float32, remembered per position until forgotten.

    The Gumbel-max trick: the largest of logits + T * G is a sample of softmax(logits / T). With the same noise two
    models that agree roughly mostly choose the same token, though each of them samples from its own distribution:

    >>> noise = Noise(seed=1, vocabulary=3)
    >>> [round(value, 2) for value in noise.row(7).tolist()]
    [-1.49, 2.8, 1.11]
    >>> target, draft = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.7, 1.4, 0.1])  # softmax: .67 .24 .09; .51 .38 .1
    >>> int((target + noise.row(7)).argmax()), int((draft + noise.row(7)).argmax())  # of .51 3.8 1.11; .21 4.2 1.21
    (1, 1)
    >>> chosen = [[int((logits + noise.row(i)).argmax()) for i in range(1000)] for logits in (target, draft)]
    >>> [chosen[0].count(token) for token in range(3)], [chosen[1].count(token) for token in range(3)]
    ([648, 263, 89], [512, 387, 101])
    >>> sum(ours == theirs for ours, theirs in zip(*chosen))
    858
    >>> noise.at(7, torch.tensor([2, 1])).equal(noise.row(7)[[2, 1]])  # of chosen ids alone, without the whole row
    True
    """

    def __init__(self, seed: int, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed % 2**64
        self.vocabulary = vocabulary
        self.device = torch.device(device)
        self._rows: dict[int, Tensor] = {}
        self._elsewhere: dict[torch.device, Noise] = {}

    def on(self, device: torch.device) -> Noise:
        """The same noise where another model computes."""
        if device == self.device:
            return self
        return self._elsewhere.setdefault(device, Noise(self.seed, self.vocabulary, device))

    def row(self, position: int) -> Tensor:
        """Noise of every token at one position, [V] float32."""
        if position not in self._rows:
            bits_V = philox_row(self.seed, position, self.vocabulary)
            self._rows[position] = torch.from_numpy(gumbel(bits_V).astype(np.float32)).to(self.device)
        return self._rows[position]

    def rows(self, positions: Iterable[int]) -> Tensor:
        """Noise of several positions, [P, V] float32."""
        return torch.stack([self.row(position) for position in positions])

    def at(self, position: int, ids_K: Tensor) -> Tensor:
        """Noise of some tokens only, [K] float32: the same values `row` would give, without making the row."""
        bits_K = philox_lanes(self.seed, position, ids_K).cpu().numpy().view(np.uint64)
        return torch.from_numpy(gumbel(bits_K).astype(np.float32)).to(ids_K.device)

    def forget_before(self, position: int) -> None:
        """Drop the remembered rows that no later choice can ask for."""
        for one in (self, *self._elsewhere.values()):
            one._rows = {kept: row for kept, row in one._rows.items() if kept >= position}


def gumbel(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Standard Gumbel values -log(-log(1 - u)) from 64-bit draws, float64. All 64 bits count, for the far upper tail.

    >>> gumbel(np.array([2**63], np.uint64)).round(4).tolist()  # u = 1/2, the median: -log(log 2)
    [0.3665]
    """
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-64
    # Large noise comes from small u, where float64 is dense; u must stay below 1 for the other end.
    exponential = -np.log1p(-np.minimum(uniform, 1.0 - 2.0**-53))
    return -np.log(exponential)


def philox_row(seed: int, position: int, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """64 random bits for each of the ids 0 … count - 1, uint64, by numpy's own Philox (which promises these bits)."""
    key = np.array([seed % 2**64, position], np.uint64)
    # numpy increments the counter before its first block: start at -1 to make block 0 the counter 0.
    start = np.full(4, 2**64 - 1, np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=start).random_raw(count), np.uint64)


def philox_lanes(seed: int, position: int, ids_K: Tensor) -> Tensor:
    """The same bits for chosen ids only, as int64 on the device of `ids_K` (CPU and CUDA agree: integers)."""
    zero_K = torch.zeros_like(ids_K)
    counter = [ids_K // 4, zero_K, zero_K, zero_K]
    key = [seed % 2**64, position % 2**64]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ _signed(key[0]), low1, high0 ^ counter[3] ^ _signed(key[1]), low0]
        key = [(word + step) % 2**64 for word, step in zip(key, _WEYL, strict=True)]
    return torch.stack(counter).gather(0, (ids_K % 4).unsqueeze(0)).squeeze(0)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of an unsigned product, from 32-bit halves held in wrapping int64."""
    a_low, a_high = a & _LOW32, (a >> 32) & _LOW32
    b_low, b_high = b & _LOW32, b >> 32
    low_low, high_low, low_high = a_low * _signed(b_low), a_high * _signed(b_low), a_low * _signed(b_high)
    middle = ((low_low >> 32) & _LOW32) + (high_low & _LOW32) + (low_high & _LOW32)
    high = a_high * _signed(b_high) + ((high_low >> 32) & _LOW32) + ((low_high >> 32) & _LOW32) + (middle >> 32)
    return high, a * _signed(b)


def _signed(word: int) -> int:
    """The int64 with the same bits."""
    return word - 2**64 if word >= 2**63 else word
