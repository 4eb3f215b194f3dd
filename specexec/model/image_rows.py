"""Images among the tokens of a text: their rows have ids that no vocabulary has, made from a hash of the image.

So whatever compares texts (shared beginnings, kept keys and values) tells two images apart by their tokens alone. What
a language model reads in place of those tokens comes from a tower, at most once for each image that is alive.
R rows   H hidden size   L tokens of a text   A axes of their positions
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from threading import Lock
from typing import Literal, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specexec.errors import UnsupportedArchitecture
from specexec.sizes import FIRST_IMAGE_ROW

MOST_ROWS = 1 << 16
_HASH_BITS = 62 - 16


class Seen(Protocol):
    """What a tower makes of an image: rows [R, H], and others that are added after the first layers."""

    @property
    def rows_RH(self) -> Tensor: ...

    @property
    def deeper(self) -> tuple[Tensor, ...]: ...


@dataclass(eq=False)
class Image:
    """One image for one model: its rows, and what the model's processor makes of it for prompts and for the tower.

    `number` tells it from every other image. `text` is what a prompt holds in its place, `words` are the tokens in it
    that stand for its rows. `height` times `width` are its rows, where they have places on a grid.
    """

    number: int
    words: tuple[int, ...]
    text: str
    prepare: Callable[[], Mapping[str, Tensor]]
    height: int = 0
    width: int = 0

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.words)

    @property
    def tokens(self) -> list[int]:
        """The ids of its rows."""
        first = FIRST_IMAGE_ROW | self.number * MOST_ROWS
        return list(range(first, first + self.rows))


@dataclass(frozen=True)
class Sight:
    """How the language model of a family takes the rows of images.

    `axes`: how many positions each token has, where rows of images have a height and a width beside a time (M-RoPE,
    Qwen2-VL, arXiv 2409.12191). `beside`: text is counted as if there were no images, and of the last three axes rows
    of an image have the width, the height and the image's number (Hunyuan). `together`: rows of one image see one
    another, in all layers or in those with a window. `by_layer`: each layer has embeddings of its own, in which a row
    of an image counts as padding.
    """

    axes: int = 0
    beside: bool = False
    together: Literal["no", "all", "window"] = "no"
    by_layer: bool = False


def number_of(content: bytes) -> int:
    """The number of an image, from its bytes and whatever else makes it what it is."""
    return int.from_bytes(hashlib.sha256(content).digest()) >> (256 - _HASH_BITS)


def is_row(token: int) -> bool:
    """Whether a token is a row of an image."""
    return token >= FIRST_IMAGE_ROW


def number_in(token: int) -> int:
    """The number of the image whose row this is."""
    return (token - FIRST_IMAGE_ROW) // MOST_ROWS


@dataclass(frozen=True)
class ImageRun:
    """Rows of one image that follow one another in a text: from `start` to before `stop`, the first its row `row`."""

    number: int
    start: int
    stop: int
    row: int = 0


def runs(tokens: Items[int]) -> list[ImageRun]:
    """All images in a text, in order; one whose rows are parted by other tokens is several runs."""
    found: list[ImageRun] = []
    last = -2
    for at, token in enumerate(tokens):
        if token < FIRST_IMAGE_ROW:
            continue
        if at == last + 1 and token == tokens[last] + 1:
            found[-1] = replace(found[-1], stop=at + 1)
        else:
            found.append(ImageRun(number_in(token), at, at + 1, (token - FIRST_IMAGE_ROW) % MOST_ROWS))
        last = at
    return found


class Images:
    """The images that one model knows, as long as somebody holds them, and its tower. Safe from several threads.

    `word` is the token of the vocabulary that usually stands for a row. What the tower made is kept for `kept` rows.
    """

    def __init__(self, sight: Sight, word: int, kept: int) -> None:
        self.sight, self.word, self._kept = sight, word, kept
        self.tower: Callable[[Mapping[str, Tensor]], Seen] | None = None
        self._seen: OrderedDict[int, Seen] = OrderedDict()
        self._known: WeakValueDictionary[int, Image] = WeakValueDictionary()
        self._lock = Lock()

    def known(self, number: int) -> Image | None:
        """The image of that number, if it is held by anybody."""
        with self._lock:
            return self._known.get(number)

    def keep(self, image: Image) -> Image:
        """From now on known as long as what is returned is held; the same image is one object."""
        with self._lock:
            return self._known.setdefault(image.number, image)

    def among(self, tokens: Items[int]) -> tuple[Image, ...] | None:
        """Those whose rows a text holds; None where one of them is not known, or has no such row."""
        found: list[Image] = []
        for run in runs(tokens):
            image = self.known(run.number)
            if image is None or run.row + run.stop - run.start > image.rows:
                return None
            found.append(image)
        return tuple(found)

    def as_words(self, tokens: Items[int]) -> list[int]:
        """The tokens as a tokenizer knows them, with those that stand for rows of images."""
        words = list(tokens)
        for run in runs(tokens):
            image, length = self.known(run.number), run.stop - run.start
            words[run.start : run.stop] = image.words[run.row : run.row + length] if image else [self.word] * length
        return words

    def seen(self, number: int) -> Seen:
        """What the model reads in place of an image."""
        image = self.known(number)
        assert image is not None, "a text holds its images as long as it is written"
        found = self._seen.pop(number, None)
        if found is None:
            assert self.tower is not None, "a model that reads images has its tower"
            found = self.tower(image.prepare())
            if len(found.rows_RH) != image.rows:
                raise UnsupportedArchitecture(
                    f"the tower makes {len(found.rows_RH)} rows of an image that has {image.rows} tokens in a prompt.",
                    hint="the repository's newest processor_config.json: its settings do not fit config.json.",
                )
        self._seen[number] = found
        while len(self._seen) > 1 and sum(len(one.rows_RH) for one in self._seen.values()) > self._kept:
            self._seen.popitem(last=False)
        return found

    def positions(self, tokens: Items[int]) -> GridPositions:
        """Time, height and width of every token of a text, or whatever the axes are.

        A token of text is one further than all before it, in all three. Rows of an image share one time, and count
        height and width from there (Qwen2-VL, section 2.1).
        """
        L = len(tokens)
        if self.sight.beside:
            return self._beside(tokens)
        positions_3L = np.tile(np.arange(L), (3, 1))
        shift = 0
        after = 0
        for run in runs(tokens):
            positions_3L[:, after : run.start] += shift
            image = self.known(run.number)
            assert image is not None
            row_R = np.arange(run.row, run.row + run.stop - run.start)
            begin = run.start - run.row + shift
            positions_3L[0, run.start : run.stop] = begin
            positions_3L[1, run.start : run.stop] = begin + row_R // image.width
            positions_3L[2, run.start : run.stop] = begin + row_R % image.width
            shift += max(image.height, image.width) - image.rows
            after = run.stop
        positions_3L[:, after:] += shift
        return GridPositions(positions_3L, shift)

    def _beside(self, tokens: Items[int]) -> GridPositions:
        positions_AL = np.tile(np.arange(len(tokens)), (self.sight.axes, 1))
        for number, run in enumerate(runs(tokens)):
            image = self.known(run.number)
            assert image is not None
            around = (image.rows - image.height * image.width) // 2  # rows before its first line and after its last
            row_R = np.arange(run.row, run.row + run.stop - run.start) - around
            inside_R = (row_R >= 0) & (row_R < image.height * image.width)
            places_3R = row_R % image.width, row_R // image.width, np.full_like(row_R, number)
            here = slice(run.start, run.stop)
            positions_AL[-3:, here] = np.where(inside_R, places_3R, positions_AL[-3:, here])
        return GridPositions(positions_AL, 0)


@dataclass(frozen=True)
class GridPositions:
    """Positions of a text's tokens, int64 [A, L], and what is added to the place of a token that follows them."""

    positions_AL: NDArray[np.int64]
    shift: int

    def at(self, places_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of rows by their places in the text, [A, R]; those beyond it are text."""
        A, L = self.positions_AL.shape
        beyond_R = places_R >= L
        found_AR = (
            self.positions_AL[:, np.where(beyond_R, 0, places_R)] if L else np.zeros((A, len(places_R)), np.int64)
        )
        return np.where(beyond_R, places_R + self.shift, found_AR)


def without_rows(tokens: Iterable[int]) -> list[int]:
    """The tokens of the vocabulary."""
    return [token for token in tokens if token < FIRST_IMAGE_ROW]
