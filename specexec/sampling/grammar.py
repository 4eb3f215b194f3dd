"""A grammar that an answer must follow: which tokens may come next, after the text and along every path of a tree.

llguidance does the parsing. Knows no model: a grammar forbids tokens, the choice among the others stays the target's.
P paths   V vocabulary   B bytes of a bit per token
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from typing import TypeAlias

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from specexec.errors import BadGrammar
from specexec.sampling.json_schema import laid_out
from specexec.sampling.large_stack import on_large_stack

Bits: TypeAlias = NDArray[np.uint8]


def json_schema(schema: Mapping[str, object], lenient: bool = False) -> str:
    """The grammar of JSON that a schema describes; `lenient` passes over keywords that llguidance cannot enforce.

    A schema that llguidance cannot read is refused when its grammar is read (`Grammars.grammar`).
    """
    return LLMatcher.grammar_from_json_schema(laid_out(schema, lenient))


def regex(pattern: str) -> str:
    """The grammar of texts that match from end to end (Rust's syntax)."""
    return LLMatcher.grammar_from_regex(pattern)


def byte_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: int | None = None,
    ends: list[int] | None = None,
    slices: list[str] | None = None,
) -> LLTokenizer:
    """The tokenizer as llguidance has it: tokens are bytes. What is None is the tokenizer's own."""
    backend = tokenizer.backend_tokenizer
    if backend.padding or backend.truncation:
        return from_tokenizer(tokenizer, vocabulary, ends, slices)
    # The same without the copy that it makes to turn both off, which takes a second for 200,000 tokens.
    ended = tokenizer.eos_token_id if ends is None else ends
    return LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=ended, slices=slices)


class Grammars:
    """Makes grammars for one tokenizer; `stop_tokens` may follow a finished text. Raises BadGrammar without any."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_tokens: Iterable[int]) -> None:
        ends = sorted(stop_tokens)
        if not ends:
            raise BadGrammar("this model has no token that ends a text, so a grammar could not end either.")
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise BadGrammar(f"grammars need a fast tokenizer; this model has {type(tokenizer).__name__}.")
        self._tokenizer = byte_tokenizer(tokenizer, max(vocabulary, len(tokenizer)), ends)

    def grammar(self, text: str) -> Grammar:
        """Read a grammar: what `json_schema` or `regex` made, or llguidance's own Lark. Raises BadGrammar."""
        matcher = on_large_stack(lambda: LLMatcher(self._tokenizer, text, log_level=0))
        if matcher.is_error():
            raise BadGrammar(f"the grammar cannot be used: {_first_line(matcher)}")
        return Grammar(matcher)


class Grammar:
    """What an answer must look like. Many answers may follow the same one."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def after(self, tokens: Items[int]) -> Grammar:
        """The rest of answers that begin with these tokens. Raises BadGrammar where none does."""
        matcher = self._matcher.deep_copy()
        if not matcher.consume_tokens(list(tokens)):
            raise BadGrammar(f"no answer that follows the grammar begins so: {_first_line(matcher)}")
        return Grammar(matcher)

    def start(self) -> Parse:
        """The beginning of an answer."""
        return Parse(self._matcher.deep_copy())


class Parse:
    """How far one answer has come in its grammar. `failure` says why it cannot go on, if it cannot."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.failure: BadGrammar | None = None
        self._matcher = matcher
        self._bits: dict[tuple[int, ...], Bits] = {}

    def advance(self, tokens: Items[int]) -> None:
        """The answer has grown by these tokens."""
        self._bits.clear()
        if not self._matcher.consume_tokens(list(tokens)):
            self._fail()

    def allowed(self, paths: Items[tuple[int, ...]], vocabulary: int) -> Tensor:
        """Which tokens may follow the answer and each path, bool [P, V] on CPU; all below a path that may not come."""
        bits_PB = np.stack([self._bits_after(path) for path in paths])
        return torch.from_numpy(np.unpackbits(bits_PB, axis=1, count=vocabulary, bitorder="little").view(np.bool_))

    def _bits_after(self, path: tuple[int, ...]) -> Bits:
        if path not in self._bits:
            consumed = self._matcher.try_consume_tokens(list(path))
            bits_B = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._matcher.rollback(consumed)
            if self._matcher.is_error():  # the mask then allows the end of the text only: not what was asked for
                self._fail()
            self._bits[path] = bits_B if consumed == len(path) and self.failure is None else np.full_like(bits_B, 255)
        return self._bits[path]

    def _fail(self) -> None:
        self.failure = self.failure or BadGrammar(
            f"the grammar became too hard to follow: {_first_line(self._matcher)}"
        )


def _first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("\n")[0]
