"""One tensor on disk: which bytes of which file, and where in a tensor of the module. Knows no format and no torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: `nbytes` bytes of `file` from `offset`, row-major."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def rows(self, start: int, length: int) -> "Entry":
        """The part of the tensor that holds `length` rows of its first dimension."""
        row_B = self.nbytes // self.shape[0]
        return replace(self, offset=self.offset + start * row_B, nbytes=length * row_B, shape=(length, *self.shape[1:]))

    def slices(self, most_B: int) -> "Iterator[tuple[int, Entry]]":
        """First row and rows of pieces of at most `most_B` bytes, or of one row where that is larger."""
        if self.nbytes <= most_B or not self.shape:
            yield 0, self
            return
        rows = max(1, most_B // (self.nbytes // self.shape[0]))
        for start in range(0, self.shape[0], rows):
            yield start, self.rows(start, min(rows, self.shape[0] - start))


_BEHIND = re.compile(
    r"(?P<base>.+):(?P<offset>\d{1,15}):(?P<sizes>\d{1,15}(?:x\d{1,15})*):(?P<steps>\d{1,15}(?:x\d{1,15})*)"
)


@dataclass(frozen=True)
class Strides:
    """Which items of a module's tensor, itself row-major, a stored tensor holds, and in which order.

    Item (i, j, …) is item `offset` + i * steps[0] + j * steps[1] + … of the module's.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def all_of(*sizes: int) -> "Strides":
        """All items of a tensor of this shape, in their order."""
        return Strides(sizes, tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))))

    @property
    def items(self) -> int:
        """How many they are."""
        return math.prod(self.sizes)

    def split(self, dim: int, *into: int) -> "Strides":
        """A dimension as several, the last of them of whatever size is left."""
        last = self.sizes[dim] // math.prod(into)
        inner = Strides.all_of(*into, last)
        return replace(
            self,
            sizes=(*self.sizes[:dim], *inner.sizes, *self.sizes[dim + 1 :]),
            steps=(*self.steps[:dim], *(step * self.steps[dim] for step in inner.steps), *self.steps[dim + 1 :]),
        )

    def swapped(self, one: int, other: int) -> "Strides":
        """Two dimensions in each other's place."""
        order = [*range(len(self.sizes))]
        order[one], order[other] = order[other], order[one]
        return replace(
            self, sizes=tuple(self.sizes[dim] for dim in order), steps=tuple(self.steps[dim] for dim in order)
        )

    def part(self, dim: int, start: int, stop: int) -> "Strides":
        """Some of a dimension."""
        sizes = (*self.sizes[:dim], stop - start, *self.sizes[dim + 1 :])
        return replace(self, sizes=sizes, offset=self.offset + start * self.steps[dim])

    def at(self, dim: int, index: int) -> "Strides":
        """One of a dimension, which is gone then."""
        sizes, steps = ((*all_[:dim], *all_[dim + 1 :]) for all_ in (self.sizes, self.steps))
        return Strides(sizes, steps, self.offset + index * self.steps[dim])

    def behind(self, name: str) -> str:
        """The name of a stored tensor that has this place in the tensor `name`."""
        return f"{name}:{self.offset}:{'x'.join(map(str, self.sizes))}:{'x'.join(map(str, self.steps))}"

    def fits(self, items: int) -> bool:
        """Whether all of it lies inside a tensor of so many items."""
        last = sum((size - 1) * step for size, step in zip(self.sizes, self.steps, strict=True))
        return self.items > 0 and self.offset + last < items


def placed(name: str) -> tuple[str, Strides | None]:
    """The name of the module's tensor, and the place in it where a stored tensor's name says one."""
    match = _BEHIND.fullmatch(name)
    if match is None:
        return name, None
    sizes, steps = (tuple(map(int, match[part].split("x"))) for part in ("sizes", "steps"))
    return (match["base"], Strides(sizes, steps, int(match["offset"]))) if len(sizes) == len(steps) else (name, None)


@dataclass(frozen=True)
class Change:
    """What is added to a weight before it computes: `scale` times B [O, r] @ A [r, I], to [O, I] in float32; the sum is
    rounded once.
    """

    name: str
    """Of the weight, as a checkpoint of transformers has it."""
    a: Entry
    b: Entry
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, [O, I]."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def origin(self) -> str:
        """The folder that it comes from."""
        return str(self.a.file.parent)
