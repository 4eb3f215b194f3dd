"""One tensor on disk: which bytes of which file. Knows no format and no torch."""

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
