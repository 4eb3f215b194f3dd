"""The bytes of one tokenizer's tokens, and the tokens of any bytes: how text passes between two tokenizers.

Bytes have no beginning, so a blank that decoders drop or encoders add there is neither lost nor doubled, and a
character may lie across tokens. llguidance knows how byte-level and SentencePiece vocabularies spell bytes.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from specexec.errors import TokenizerMismatch
from specexec.sampling.grammar import byte_tokenizer

SAMPLE = "One Word, two  spaces;\n\tx = 'é' + \"→\"  # 42 你好 🌱 "


class Wording:
    """One tokenizer as far as text is carried over.

    `begin` are the tokens before every text and `lead` what it puts before its first word, `end` is the
    token after the last one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError for a tokenizer whose tokens cannot be spelled as bytes."""
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"is no fast tokenizer but {type(tokenizer).__name__}")
        self._entries = len(tokenizer)
        self._tokenizer = byte_tokenizer(tokenizer, slices=[])  # those are for grammars
        self.end: int | None = tokenizer.eos_token_id
        self.begin = tuple(token for token in tokenizer("")["input_ids"] if token != self.end)
        first = self.spelled(tokenizer("a", add_special_tokens=False)["input_ids"])
        self.lead = first.removesuffix(b"a")

    def spelled(self, tokens: Items[int]) -> bytes:
        """The bytes of these tokens; ids that the tokenizer does not know have none."""
        return bytes(self._tokenizer.decode_bytes([token for token in tokens if 0 <= token < self._entries]))

    def cut(self, text: bytes) -> list[int]:
        """The tokens of these bytes as within a longer text; control tokens where they are spelled."""
        return list(self._tokenizer.tokenize_bytes(text))


def check_carried(wording: Wording) -> None:
    """Raises ValueError for a tokenizer that changes the text it is given (lower case, accents)."""
    for text in (SAMPLE, f" {SAMPLE}", f"  {SAMPLE}"):
        found = wording.spelled(wording.cut(text.encode())).decode("utf-8", "replace")
        if found != text:
            raise ValueError(f"changes text ({text!r} comes back as {found!r})")


def wording_of(tokenizer: PreTrainedTokenizerBase, refused: str) -> Wording:
    """Raises TokenizerMismatch where text cannot be carried over; `refused` begins its sentence."""
    try:
        wording = Wording(tokenizer)
        check_carried(wording)
    except ValueError as problem:
        raise TokenizerMismatch(
            f"{refused} {problem}.",
            hint="--drafter none, --drafter auto, or a drafter of the same family.",
        ) from problem
    return wording
