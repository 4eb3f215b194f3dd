"""What decoding learns, as named arrays that can be saved: finite numbers of known shapes. Knows no file.

A learner gives its arrays by `pack` and takes them by `unpack`; the object that holds it puts a name before theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from specexec.tree.tree import Floats

Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]

MOST = 1e12  # no sum of weights, rows or seconds comes near


@runtime_checkable
class Learner(Protocol):
    """What gets better estimates with every sweep. They can make a text faster, and never change it."""

    def pack(self) -> dict[str, Floats]:
        """What is worth knowing next time."""
        ...

    def unpack(self, arrays: Arrays) -> None:
        """Take up what an earlier `pack` gave. Raises ValueError for numbers that cannot be its own."""
        ...


def packed(learner: object, name: str) -> dict[str, Floats]:
    """Everything `learner` knows, its name before each array; nothing if it never learns."""
    return {f"{name}/{key}": array for key, array in learner.pack().items()} if isinstance(learner, Learner) else {}


def unpack(learner: object, name: str, arrays: Arrays) -> None:
    """The way back of `packed`."""
    own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
    if own and isinstance(learner, Learner):
        learner.unpack(own)


def sound(array: NDArray[np.generic], shape: tuple[int, ...], what: str) -> Floats:
    """The same as float64. Raises ValueError unless it has this shape (-1 = any length) and all is finite and >= 0."""
    fits = array.ndim == len(shape) and all(want in (-1, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind not in "fiu":
        raise ValueError(f"{what} has the shape {array.shape}, expected {shape}")
    numbers: Floats = array.astype(np.float64)
    if not ((numbers >= 0) & (numbers < MOST)).all():
        raise ValueError(f"{what} holds numbers that are negative, beyond reason or none")
    return numbers
