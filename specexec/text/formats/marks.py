"""Control tokens inside text: each becomes one character that decoded text never holds (half of a surrogate pair).

So a mark that is a token differs from the same characters spelled out, and forms work on plain strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Mapping
from functools import lru_cache
from typing import Protocol

_FIRST, _MOST = 0xD800, 0x800


class Vocabulary(Hashable, Protocol):
    """What is needed of a tokenizer, whose tokens stay what they are."""

    def get_added_vocab(self) -> dict[str, int]: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def eos_token_id(self) -> int | None: ...


class Marks:
    """The control tokens that one form uses, by their text."""

    def __init__(self, tokens: Mapping[str, int], special: Collection[int] = ()) -> None:
        self.tokens = dict(list(tokens.items())[:_MOST])
        self._char_of = {text: chr(_FIRST + at) for at, text in enumerate(self.tokens)}
        self._text_of = {char: text for text, char in self._char_of.items()}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.char_of_token = {token: self._char_of[text] for text, token in self.tokens.items()}
        self.special = [self.char_of_token[token] for token in set(special) & self.char_of_token.keys()]
        self.others = frozenset(special) - self.char_of_token.keys()  # special tokens that are no marks

    @staticmethod
    @lru_cache(maxsize=64)
    def of(tokenizer: Vocabulary, texts: tuple[str, ...]) -> Marks:
        """Those of these texts' parts that are tokens of their own."""
        joined = "\0".join(texts)
        added = tokenizer.get_added_vocab().items()
        tokens = {text: token for text, token in added if text.strip() and text in joined}
        return Marks(tokens, tokenizer.all_special_ids)

    def pack(self, text: str) -> str:
        """Text as a template spells it, with characters for tokens."""
        return self._any.sub(lambda found: self._char_of[found[0]], text)

    def unpack(self, text: str) -> str:
        """The tokens spelled out again."""
        return "".join(self._text_of.get(char, char) for char in text)

    def unpack_json(self, text: str) -> str:
        """The same inside JSON, where a mark can only be in a string."""
        return "".join(json.dumps(self._text_of[char])[1:-1] if char in self._text_of else char for char in text)

    def parts(self, text: str) -> list[str | int]:
        """Packed or spelled text as runs of text and token ids."""
        pieces = re.split(f"([{chr(_FIRST)}-{chr(_FIRST + _MOST - 1)}])", self.pack(text))
        return [self.tokens[self._text_of[piece]] if piece in self._text_of else piece for piece in pieces if piece]
