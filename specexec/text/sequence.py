"""One text being written: its tokens, its caches, and when it ends. Knows no model and no drafter by name."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from specexec.errors import SpecexecError
from specexec.model.cache import KVCache
from specexec.model.image_rows import Images
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import History, JudgedText, Processors
from specexec.sampling.verify import Acceptance
from specexec.sizes import MOST_NODES
from specexec.stats import FinishReason, Limit, Logprob
from specexec.text.detokenizer import TextStream
from specexec.tree.growing import Growth

if TYPE_CHECKING:
    import torch

    from specexec.sampling.grammar import Parse


@dataclass(frozen=True)
class Emitted:
    """What a sequence took from one acceptance."""

    tokens: tuple[int, ...]
    text: str
    path: tuple[int, ...]
    replaced: int = 0
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()


@dataclass(eq=False)
class Sequence:
    """A live request.

    `tokens` is prompt and answer; the last one is never in a cache, so every sweep has something to process.
    `limit` is the context length: tokens never outgrow it. `sampling` has temperature and seed filled in.
    """

    tokens: list[int]
    sampling: SamplingParams
    noise: Noise
    text: TextStream
    stop_tokens: frozenset[int]
    limit: int
    caches: dict[object, KVCache] = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    growth: Growth = field(default_factory=Growth)
    processed: int = 0  # tokens the target has in its cache, as of the last sweep
    failure: SpecexecError | None = None  # why it cannot go on, if finish_reason is "failed"
    forks: set[int] = field(default_factory=set)  # lengths at which other texts part from it
    most_nodes: int = MOST_NODES  # guesses that may hang below it in the next sweep
    images: Images | None = None  # what rows of images among its tokens mean
    unread: int = 0  # tokens of the prompt that were left out of it
    kept: list[int] | None = None  # of the prompt: whose rows stay when the target has read it; empty: all
    kv_dropped: int = 0  # tokens of the prompt whose rows are gone

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self._held = self.images.among(self.tokens) if self.images else ()
        prompt = tuple(self.words())
        self._judged = JudgedText(prompt, self.noise.vocabulary, self.stop_tokens, self.longest, str(self.noise.device))
        self.processors = Processors(self.sampling, self._judged)
        self._elsewhere: dict[torch.device, Processors] = {}
        self.parse: Parse | None = None if self.sampling.grammar is None else self.sampling.grammar.start()
        if not self.sampling.max_tokens:
            self.finish_reason = "length"

    def words(self, start: int = 0) -> list[int]:
        """Its tokens from `start` on as a tokenizer knows them: for each row of an image one token stands."""
        tokens = self.tokens[start:]
        return self.images.as_words(tokens) if self.images and self._held else tokens

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def room(self) -> int:
        """Tokens that may still be written."""
        return min(self._asked, self.limit) - len(self.tokens)

    @property
    def _asked(self) -> int:
        return self.prompt_length + self.sampling.max_tokens

    @property
    def ended_by(self) -> Limit | None:
        """Which limit ended it, if one did."""
        if self.finish_reason != "length":
            return None
        return "context" if self.limit < self._asked else "max_tokens"

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self.text.stopped_by if self.finish_reason == "stop" else None

    @property
    def longest(self) -> int:
        """The length it may still reach."""
        return len(self.tokens) + max(self.room, 0)

    @property
    def history(self) -> History:
        """What processors look at, as of now."""
        return self.processors.history(self.answer)

    def history_on(self, device: torch.device) -> History:
        """The same, for logits on the device of another model."""
        if device == self.noise.device:
            return self.history
        if device not in self._elsewhere:
            self._elsewhere[device] = Processors(self.sampling, replace(self._judged, device=str(device)))
        return self._elsewhere[device].history(self.answer)

    def cache(self, lm: object) -> KVCache:
        """This sequence's cache for one model, cut back to what both texts share."""
        cache = self.caches.setdefault(lm, KVCache())
        cache.forks = self.forks
        cache.begin(self.tokens[:-1], self.prompt_length)
        return cache

    def pending(self, lm: object) -> list[int]:
        """Tokens that one model has not processed yet; never empty."""
        return self.tokens[len(self.cache(lm)) :]

    def accept(self, acceptance: Acceptance) -> Emitted:
        """Take tokens until something ends the text; the rest of the walk is dropped."""
        if self.parse is not None and self.parse.failure is not None:
            return self.fail(self.parse.failure)
        start = len(self.tokens)
        for token in acceptance.tokens:
            self.tokens.append(token)
            if token in self.stop_tokens or self.text.add(token):
                self.finish_reason = "stop"
            elif not self.room:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        else:
            if acceptance.failure is not None:
                self.finish_reason, self.failure = "failed", acceptance.failure
        taken = tuple(self.tokens[start:])
        if self.parse is not None:
            self.parse.advance(taken)
        said, replaced = (
            self.text.take(last=self.finish_reason is not None),
            bisect_left(acceptance.replaced, len(taken)),
        )
        return Emitted(taken, said, acceptance.path[: len(taken)], replaced)

    def fail(self, why: SpecexecError) -> Emitted:
        """End here because nothing can follow; others that share the sweep go on."""
        self.finish_reason, self.failure = "failed", why
        return Emitted((), self.text.take(last=True), ())

    def interrupt(self) -> Emitted:
        """End here; what was written stays."""
        self.finish_reason = "interrupted"
        return Emitted((), self.text.take(last=True), ())


def start(
    tokens: Items[int],
    sampling: SamplingParams,
    noise: Noise,
    text: TextStream,
    stop_tokens: frozenset[int],
    limit: int,
    caches: dict[object, KVCache] | None = None,
    images: Images | None = None,
) -> Sequence:
    """A new request; `caches` of an earlier one are reused as far as the texts agree."""
    ends = (frozenset[int]() if sampling.ignore_eos else stop_tokens) | frozenset(sampling.stop_token_ids)
    kept = {} if caches is None else caches
    return Sequence(list(tokens), sampling, noise, text, ends, limit, kept, images=images)
