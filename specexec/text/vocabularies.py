"""Whether token ids mean the same to two models, and which of them a drafter may name. Knows no weights.

A model has a row for every id it can read or write, its tokenizer an entry for most of them: often there are more rows
than entries (padding), and a drafter may have more or fewer rows than its target.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import AddedToken, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Nameable:
    """The ids that a drafter may name: those below `rows` but the ones in `never`."""

    rows: int
    never: frozenset[int] = frozenset()


def nameable(tokenizer: PreTrainedTokenizerBase, rows: Iterable[int], never: Iterable[int] = ()) -> Nameable:
    """What the target's tokenizer has an entry for and all models have a row for; `never` are left out."""
    known = set(tokenizer.get_vocab().values())
    end = min(*rows, max(known) + 1)
    return Nameable(end, frozenset({*never, *(set(range(end)) - known)}))


def differing_ids(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> frozenset[int] | None:
    """Ids that both have but call by other names; None if the two do not share a vocabulary.

    They do if all that differs are names of added tokens, special in at least one of them: reserved places that one
    release has put to use (Llama 3.1 renamed three of 3.0's). Either may have more ids than the other.
    """
    string_of = {token: text for text, token in theirs.get_vocab().items()}
    other = {token for text, token in ours.get_vocab().items() if string_of.get(token, text) != text}
    reserved = all(_reserved(ours.added_tokens_decoder, theirs.added_tokens_decoder, token) for token in other)
    return frozenset(other) if reserved else None


def _reserved(ours: dict[int, AddedToken], theirs: dict[int, AddedToken], token: int) -> bool:
    return token in ours and token in theirs and (ours[token].special or theirs[token].special)
