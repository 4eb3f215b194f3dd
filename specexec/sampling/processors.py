"""Logits changed by earlier tokens: transformers' own processors in the order of its `generate`, OpenAI's penalties.

Each choice has a history of its own, so every node of a tree is judged by its own path. Filters and noise come after.
N choices   L tokens of a history   V vocabulary
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation import logits_process as theirs

from specexec.sampling.params import SamplingParams

Process: TypeAlias = Callable[[torch.LongTensor, Tensor], Tensor]  # of token ids [N, L] and logits [N, V]


@dataclass(frozen=True)
class JudgedText:
    """The text that is judged: at most `longest` tokens, each below `vocabulary`; any of `ends` ends it."""

    prompt: tuple[int, ...]
    vocabulary: int
    ends: frozenset[int] = frozenset()
    longest: int | None = None
    device: str = "cpu"

    @property
    def ids(self) -> torch.LongTensor:
        """The prompt, [1, L]."""
        return cast(torch.LongTensor, torch.tensor([self.prompt], device=self.device))


class Processors:
    """What the tokens of one text make of the logits after it."""

    def __init__(self, sampling: SamplingParams, text: JudgedText) -> None:
        self._vocabulary = text.vocabulary
        self._prompt = text.prompt
        self._in_order = [*_of_generate(sampling, text), *_of_openai(sampling, len(text.prompt))]

    def history(self, answer: Items[int]) -> History:
        """That of the token that follows prompt and answer. It is empty where nothing would look at it."""
        return History(array("q", [*self._prompt, *answer] if self else []), self)

    def __bool__(self) -> bool:
        return bool(self._in_order)

    def __call__(self, ids_NL: torch.LongTensor, logits_NV: Tensor) -> Tensor:
        """Logits after N histories of one length. A drafter may know fewer tokens than the model, or more."""
        known = logits_NV.shape[-1]
        logits_NV = pad(logits_NV, (0, max(self._vocabulary - known, 0)), value=float("-inf"))
        for process in self._in_order:
            logits_NV = process(ids_NL, logits_NV)
        return logits_NV[:, :known]


@dataclass(frozen=True)
class History:
    """The tokens before a choice, as far as processors read them."""

    tokens: array[int]
    processors: Processors = field(compare=False)

    def after(self, tokens: Items[int]) -> History:
        """The history once `tokens` have been written too."""
        return History(self.tokens + array("q", tokens), self.processors)


def processed(logits_NV: Tensor, histories: Items[History]) -> Tensor:
    """Logits float32 [N, V], row n changed by what histories[n] says. All histories are of one text, any lengths."""
    if not histories or not (processors := histories[0].processors):
        return logits_NV
    rows_of = defaultdict(list)
    for row, history in enumerate(histories):
        rows_of[len(history.tokens)].append(row)
    out_NV = torch.empty_like(logits_NV)
    for length, rows in rows_of.items():
        tokens = b"".join(histories[row].tokens.tobytes() for row in rows)
        ids_NL = torch.frombuffer(bytearray(tokens), dtype=torch.int64).view(-1, length).to(logits_NV.device)
        out_NV[rows] = processors(cast(torch.LongTensor, ids_NL), logits_NV[rows])
    return out_NV


def _of_generate(sampling: SamplingParams, text: JudgedText) -> Iterator[Process]:
    """Those of GenerationMixin._get_logits_processor, for ids that can be written; a grammar rules forced ones out."""
    start = len(text.prompt)
    ends = torch.tensor(_below(text.vocabulary, text.ends), device=text.device)
    if sampling.sequence_bias:
        known = [(phrase, bias) for phrase, bias in sampling.sequence_bias if max(phrase) < text.vocabulary]
        biases: list[list[list[int] | float]] = [[[*phrase], float(bias)] for phrase, bias in known]
        if biases:
            yield theirs.SequenceBiasLogitsProcessor(biases)
    if sampling.encoder_repetition_penalty not in (None, 1):
        yield theirs.EncoderRepetitionPenaltyLogitsProcessor(float(sampling.encoder_repetition_penalty), text.ids)
    if sampling.repetition_penalty not in (None, 1):
        yield theirs.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        yield theirs.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size)
    if sampling.encoder_no_repeat_ngram_size:
        yield theirs.EncoderNoRepeatNGramLogitsProcessor(sampling.encoder_no_repeat_ngram_size, text.ids)
    if sampling.bad_words_ids:
        words = [list(phrase) for phrase in sampling.bad_words_ids if max(phrase) < text.vocabulary]
        if words:
            yield theirs.NoBadWordsLogitsProcessor(words, ends)
    least = sampling.min_length or 0 if sampling.min_tokens is None else start + sampling.min_tokens
    if len(ends) and least:
        yield theirs.MinLengthLogitsProcessor(least, ends)
    if sampling.forced_bos_token_id is not None and sampling.grammar is None:
        yield theirs.ForcedBOSTokenLogitsProcessor(sampling.forced_bos_token_id)
    forced = _below(text.vocabulary, sampling.forced_eos_token_id or ())
    if forced and text.longest is not None and sampling.grammar is None:
        yield theirs.ForcedEOSTokenLogitsProcessor(text.longest, forced)
    if sampling.exponential_decay_length_penalty and len(ends):
        yield theirs.ExponentialDecayLengthPenalty(sampling.exponential_decay_length_penalty, ends, start)
    if sampling.suppress_tokens:
        yield theirs.SuppressTokensLogitsProcessor(sampling.suppress_tokens)
    if sampling.begin_suppress_tokens:
        begin = start + (start == 1 and sampling.forced_bos_token_id is not None)
        yield theirs.SuppressTokensAtBeginLogitsProcessor(sampling.begin_suppress_tokens, begin)


def _below(vocabulary: int, tokens: Items[int] | frozenset[int]) -> list[int]:
    return sorted(token for token in tokens if token < vocabulary)


def _of_openai(sampling: SamplingParams, prompt_length: int) -> Iterator[Process]:
    """Presence and frequency penalties, which count the answer only."""
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty

    def process(ids_NL: torch.LongTensor, logits_NV: Tensor) -> Tensor:
        answer_NA = ids_NL[:, prompt_length:]
        ones_NA = logits_NV.new_ones(answer_NA.shape)
        counts_NV = torch.zeros_like(logits_NV).scatter_add_(1, answer_NA, ones_NA)
        return logits_NV - (presence * (counts_NV > 0) + frequency * counts_NV)

    if presence or frequency:
        yield process
