"""What a sweep emitted and cost, and the totals of an answer. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from specexec.pieces import Piece

if TYPE_CHECKING:
    from specexec.tree.tree import TokenTree

FinishReason = Literal["stop", "length", "interrupted", "failed"]
Limit = Literal["max_tokens", "context"]  # what ended a text whose finish_reason is "length"


@dataclass(frozen=True)
class Cost:
    """What one step took, for all its sequences together: seconds and bytes. `wait_s` of `sweep_s` waited for weights.

    For `ahead_s` of them the drafter guessed on, and `used_s` of these went into what the next trees start from.
    """

    draft_s: float = 0.0
    sweep_s: float = 0.0
    bytes_read: int = 0
    wait_s: float = 0.0
    ahead_s: float = 0.0
    used_s: float = 0.0


@dataclass(frozen=True)
class Overlap:
    """Drafting while weights stream, summed up. A hit: the text went where the drafter had drafted ahead."""

    hits: int = 0
    misses: int = 0
    draft_s: float = 0.0  # that decoding waited for
    ahead_s: float = 0.0  # while weights streamed
    used_s: float = 0.0  # of these, for nodes that the next trees started from

    @staticmethod
    def of(cost: Cost, hits: Iterable[bool | None]) -> Overlap:
        """One step; `hits` of its texts are `Burst.hit`."""
        known = [hit for hit in hits if hit is not None]
        return Overlap(known.count(True), known.count(False), cost.draft_s, cost.ahead_s, cost.used_s)

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.hits + other.hits,
            self.misses + other.misses,
            self.draft_s + other.draft_s,
            self.ahead_s + other.ahead_s,
            self.used_s + other.used_s,
        )

    @property
    def hit_rate(self) -> float | None:
        """None where nothing was guessed ahead."""
        known = self.hits + self.misses
        return self.hits / known if known else None

    @property
    def hidden(self) -> float:
        """The share of the drafting that decoding did not wait for: what was used, over that and what was waited for.

        An estimate: not every node that lives on would have been asked about otherwise.
        """
        return self.used_s / (self.used_s + self.draft_s) if self.used_s else 0.0


@dataclass
class Speed:
    """Tokens that were written, in so many sweeps and seconds, drafting included."""

    tokens: int = 0
    sweeps: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One sweep."""
        self.tokens += tokens
        self.sweeps += 1
        self.seconds += seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Pace:
    """How fast texts were written, `alone` and any number `together`, and how fast plain decoding would have been.

    Sweeps that read a prompt do not count. `plain` are those that carried no guesses. The others bound what plain
    decoding would have written meanwhile: `at_least` and `at_most` so many tokens.
    """

    alone: Speed = field(default_factory=Speed)
    together: Speed = field(default_factory=Speed)
    plain: Speed = field(default_factory=Speed)
    text_s: float = 0.0  # each second once for every text that was being written
    at_least: float = 0.0
    at_most: float = 0.0

    def learn(self, rows: int, nodes: int, tokens: list[int], cost: Cost, share: float = 1.0) -> None:
        """A step over `rows` rows, `nodes` of them guesses. Plain decoding needs a `share` of what it waited for.

        Without its guesses the sweep would have taken no longer, drafting would have taken none, and the weights that
        arithmetic waited for would have had to come anyway.
        """
        texts, seconds = len(tokens), cost.draft_s + cost.sweep_s
        if rows != nodes + texts:
            return
        self.together.add(sum(tokens), seconds)
        if texts == 1:
            self.alone.add(sum(tokens), seconds)
        if not nodes:
            self.plain.add(texts, cost.sweep_s)
        self.text_s += texts * seconds
        self.at_least += texts * seconds / max(cost.sweep_s, 1e-9)
        self.at_most += texts * seconds / max(share * cost.wait_s, 1e-9)

    @property
    def plain_tokens(self) -> float | None:
        """What plain decoding would have written meanwhile, by the sweeps that carried no guesses. None without any."""
        return self.text_s * self.plain.sweeps / self.plain.seconds if self.plain.seconds else None

    @property
    def in_doubt(self) -> bool:
        """Whether one more sweep without guesses is worth its time: after 1, 4, 16, 64, … while bounds are too wide."""
        due = self.together.sweeps.bit_length() > 2 * self.plain.sweeps
        return due and self.at_least <= self.together.tokens < self.at_most


@dataclass(frozen=True)
class Logprob:
    """log P(token | text before it) of the model itself, before temperature, bias, grammar, penalties and filters.

    `top` are the likeliest tokens there, best first, each with its own.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Burst:
    """What one sweep gave one sequence, and what the sweep cost, which all sequences of the sweep share.
    `tokens` are ids, `text` what became readable with them (a character may take several tokens). `tree` is what was
    guessed, `path` the indices of its accepted nodes. The last burst of a text has a `finish_reason`; `limit` says
    which limit, where that is "length".

    `hit`: whether the next tree starts from what was guessed meanwhile; None if nothing was, or if the text has ended.
    `logprobs` has one entry per token if they were asked for; `prompt_logprobs`, in the first burst, one for every
    token of the prompt but the first. `piece` is its text told apart into content, thoughts and calls, in a dialogue.
    `stop_text` is the stop string that ended the text, if one did. `replaced` counts tokens that the target would not
    have chosen: those of a step that was kept whole, where that was asked for (lossy/steps.py); `unread` tokens of the
    prompt that it was not shown (lossy/prompts.py), `kv_dropped` those whose keys and values it wrote without
    (lossy/keys.py).
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    tree: TokenTree
    path: tuple[int, ...]
    seed: int
    cost: Cost
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    hit: bool | None = None
    limit: Limit | None = None
    piece: Piece = field(default_factory=Piece)
    stop_text: str | None = None
    replaced: int = 0
    unread: int = 0
    kv_dropped: int = 0

    @property
    def overlap(self) -> Overlap:
        """What was drafted meanwhile, and whether it was of use; of a sweep that served this text alone."""
        return Overlap.of(self.cost, [self.hit])

    @property
    def draft_s(self) -> float:
        return self.cost.draft_s

    @property
    def sweep_s(self) -> float:
        return self.cost.sweep_s

    @property
    def bytes_read(self) -> int:
        return self.cost.bytes_read

    @property
    def nodes(self) -> int:
        """Guesses the target looked at."""
        return len(self.tree)

    @property
    def accepted(self) -> int:
        """Guesses that became text."""
        return len(self.path)


@dataclass(frozen=True)
class Completion:
    """One finished answer. `index` is its place among the prompts of the call, `seed` the one that repeats it.
    `nodes` guesses were checked in `sweeps` sweeps and `accepted` of them became text. `bytes_read` is its share of the
    weights that were moved, `seconds` the time on the clock since the text was admitted.

    `logprobs` and `prompt_logprobs` are those of `Burst`; of tokens that an earlier run has written there are none.
    `replaced` counts steps that the target would have written otherwise, each by the tokens that it would not have
    chosen: one for each sweep (lossy/steps.py). `unread` tokens of the prompt were not shown to it (lossy/prompts.py),
    `kv_dropped` ones left no keys and values (lossy/keys.py).
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    sweeps: int
    nodes: int
    accepted: int
    bytes_read: int
    seconds: float
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    limit: Limit | None = None
    replaced: tuple[int, ...] = ()
    unread: int = 0
    kv_dropped: int = 0

    @property
    def tokens_per_sweep(self) -> float:
        return len(self.tokens) / self.sweeps if self.sweeps else 0.0


@dataclass(frozen=True)
class Progress:
    """Where the running sweep is: `layer` of `layers` are done, after `sweeps` whole ones. Bytes since loading."""

    layer: int
    layers: int
    sweeps: int
    bytes_read: int
