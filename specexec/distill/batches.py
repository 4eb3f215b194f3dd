"""Recorded texts as batches to train on: cut, mixed, of about as many tokens each. The same seed, the same batches.

B texts of a batch   R tokens, those of shorter texts padded   F states side by side   N likeliest tokens
H hidden size
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specexec.distill.recording import Recording
from specexec.errors import BadRecording

HELD_OUT, MOST_HELD_OUT = 20, 40  # every so many texts one is not trained on, at most so many
MIXED = 32  # batches whose pieces are sorted by length together


@dataclass(frozen=True)
class Excerpt:
    """The tokens `first` … `end` - 1 of one text."""

    text: int
    first: int
    end: int


def _pieces(recording: Recording, texts: Items[int], length: int) -> Iterator[Excerpt]:
    for text in texts:
        tokens = recording.length(text)
        for first in range(0, tokens - 1, length):
            yield Excerpt(text, first, min(first + length, tokens))


def _packed(pieces: Items[Excerpt], rows: int) -> list[list[Excerpt]]:
    """Pieces that are sorted by length, as many together as have at most `rows` tokens with their padding."""
    found = list[list[Excerpt]]()
    for piece in pieces:
        longest = piece.end - piece.first
        if not found or (len(found[-1]) + 1) * longest > rows:
            found.append([])
        found[-1].append(piece)
    return found


@dataclass(frozen=True)
class TextBatch:
    """Tokens int64 [B, R], bool [B, R] for those of answers, states [B, R, F] of the taps, and what is likeliest after
    each: [B, R, N], and the natural logarithm of the probabilities; what flows out of the last layer [B, R, H]."""

    tokens_BR: Tensor
    answer_BR: Tensor
    states_BRF: Tensor
    top_ids_BRN: Tensor
    top_log_probs_BRN: Tensor
    last_BRH: Tensor


@dataclass(frozen=True)
class Texts:
    """Those of a recording to learn from, and those that are held out."""

    recording: Recording
    taught: tuple[Excerpt, ...]
    held_out: tuple[Excerpt, ...]

    @classmethod
    def of(cls, recording: Recording, length: int) -> Texts:
        """All texts in pieces of at most `length` tokens. Raises BadRecording where there are too few."""
        texts = recording.texts
        if len(texts) < 2:
            raise BadRecording(
                f"{recording.folder} holds {len(texts)} texts: one to learn from and one to hold out are the least.",
                hint="specexec distill record with more prompts; some hundred are a beginning.",
            )
        held_out = texts[::HELD_OUT][:MOST_HELD_OUT]
        taught = [text for text in texts if text not in held_out]
        return cls(recording, *(tuple(_pieces(recording, some, length)) for some in (taught, held_out)))

    @property
    def name(self) -> str:
        """What the texts to learn from hold, by a hash of their tokens."""
        found = hashlib.sha256()
        for text in sorted({piece.text for piece in self.taught}):
            found.update(self.recording.tokens(text)[0].long().numpy().tobytes())
        return found.hexdigest()[:16]

    @property
    def tokens(self) -> int:
        """Of the texts to learn from."""
        return sum(piece.end - piece.first for piece in self.taught)

    def epoch(self, number: int, rows: int, seed: int) -> list[list[Excerpt]]:
        """The batches of one pass over the texts: at most `rows` tokens each, padding too, or one longer piece."""
        drawn = torch.Generator().manual_seed(seed + 1_000_003 * number)
        order = torch.randperm(len(self.taught), generator=drawn).tolist()
        pieces = [self.taught[at] for at in order]
        found = list[list[Excerpt]]()
        mean = max(self.tokens // len(pieces), 1)
        together = max(MIXED * rows // mean, 1)
        for at in range(0, len(pieces), together):
            some = sorted(pieces[at : at + together], key=lambda piece: piece.end - piece.first)
            found += _packed(some, rows)
        return [found[at] for at in torch.randperm(len(found), generator=drawn).tolist()]

    def held_out_batches(self, rows: int) -> Iterator[TextBatch]:
        """Those that are not learned from."""
        ordered = sorted(self.held_out, key=lambda piece: piece.end - piece.first)
        return (self.batch(pieces) for pieces in _packed(ordered, rows))

    def batch(self, pieces: Items[Excerpt]) -> TextBatch:
        """These pieces, read from the disk."""
        read = [self.recording.read(one.text, one.first, one.end) for one in pieces]
        return TextBatch(
            pad_sequence([one.tokens_R for one in read], batch_first=True),
            pad_sequence([one.answer_R for one in read], batch_first=True),
            pad_sequence([one.states_RTH[:, :-1].flatten(1) for one in read], batch_first=True),
            pad_sequence([one.top_ids_RN.long() for one in read], batch_first=True),
            pad_sequence([one.top_log_probs_RN for one in read], batch_first=True),
            pad_sequence([one.states_RTH[:, -1] for one in read], batch_first=True),
        )
