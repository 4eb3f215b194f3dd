"""A target, its drafter and the loop as one thing to talk to. Knows no file and no device: compose makes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from torch import Tensor
from transformers import PreTrainedModel

from specexec import sequence as sequences
from specexec.afresh import Afresh
from specexec.batch import MOST_PARALLEL, Batch
from specexec.cache import KVCache
from specexec.calibration import Calibration
from specexec.chain import ChainLM
from specexec.conversation import Conversation, Prompt
from specexec.cost import CostModel
from specexec.decoder import Decoder, Meter, Step
from specexec.defaults import filled, stop_tokens
from specexec.drafters import Drafter
from specexec.drafters.auto import calibrated
from specexec.encoding import Encoding
from specexec.errors import BadSampling, ContextLengthExceeded, EmptyPrompt
from specexec.grammar import Grammar, Grammars
from specexec.learned import Arrays, packed, unpack
from specexec.lm import Rows, TreeLM
from specexec.memory import Memory
from specexec.noise import Noise
from specexec.planner import Planner
from specexec.room import Room
from specexec.sampling import History, SamplingParams, compared, constrained, derived_seed
from specexec.scoring import likelihoods
from specexec.sequence import Sequence
from specexec.stats import Burst, Completion, Overlap, Pace, Progress
from specexec.tree import ROOT, Floats, TokenTree
from specexec.walk import Acceptance
from specexec.work import Continuation, Failure, Likelihood, Request, Result


class Placed(Protocol):
    """Where weights live (offload's Placement)."""

    @property
    def summary(self) -> str: ...


class Weights(Protocol):
    """The target's weights on the move (offload's ModelStream)."""

    @property
    def placement(self) -> Placed: ...

    @property
    def layers(self) -> int: ...

    @property
    def bytes_per_sweep(self) -> int: ...

    def stats(self) -> Meter: ...

    def unwaited(self) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What an engine is made of. `folders` says where target and drafter came from, `sources` how --drafter would name
    who guesses, and `reason` why `auto` took them; it is empty where they were asked for. `own_code`: the target is
    computed by code from its folder."""

    name: str
    toy: bool
    folders: Mapping[str, Path]
    encoding: Encoding
    model: PreTrainedModel
    stream: Weights
    target: TreeLM | ChainLM
    draft: TreeLM | None
    drafter: Drafter
    planner: Planner
    sources: str
    reason: str
    budget: int | Literal["auto"]
    cost: CostModel
    context: int
    room: Room
    memory: Memory | None
    exact: bool
    own_code: bool


class Engine:
    """A target, its drafter and the loop, ready to write. A context manager; `close` frees memory and threads."""

    def __init__(self, parts: Parts) -> None:
        self.name, self.toy, self.folders = parts.name, parts.toy, parts.folders
        self.encoding = parts.encoding
        self.tokenizer = parts.encoding.tokenizer
        self.encode, self.decode = parts.encoding.encode, parts.encoding.decode
        self.context, self.memory = parts.context, parts.memory
        self._room = parts.room
        self._model, self._stream = parts.model, parts.stream
        self._target, self._draft = parts.target, parts.draft
        self.sources, self.reason, self.own_code = parts.sources, parts.reason, parts.own_code
        meter, cost = parts.stream.stats, parts.cost
        self.afresh = Afresh(parts.target, parts.model.dtype) if parts.exact else None
        self._decoder = Decoder(
            parts.target,
            parts.drafter,
            parts.planner,
            parts.budget,
            meter,
            cost=cost,
            afresh=self.afresh,
            unwaited=parts.stream.unwaited,
            room=parts.room,
        )
        self._bursts: dict[Sequence, deque[Burst]] = {}
        self._stop_tokens = stop_tokens(parts.model.generation_config, parts.encoding.tokenizer.eos_token_id)

    # What it is

    @property
    def drafter_name(self) -> str:
        return self._decoder.drafter.name

    def calibration(self, sampling: SamplingParams) -> Calibration | None:
        """What was learned about the scores of the drafter model at this temperature; None if no model drafts."""
        model = calibrated(self._decoder.drafter)
        return None if model is None else model.calibration(sampling)

    @property
    def pace(self) -> Pace:
        """How fast texts were written so far."""
        return self._decoder.pace

    @property
    def overlap(self) -> Overlap:
        """What drafting while weights streamed came to so far."""
        return self._decoder.overlapped

    @property
    def device(self) -> str:
        return str(self._target.device)

    @property
    def dtype(self) -> str:
        """The number format that the target computes in."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def weights(self) -> Weights:
        """The target's weights on the move."""
        return self._stream

    @property
    def placement(self) -> str:
        """One line: where the weights live and what a sweep moves."""
        return self._stream.placement.summary

    @property
    def budget(self) -> int | Literal["auto"]:
        """Guesses checked per sweep and sequence; 0 is plain decoding, auto as many as pay for themselves."""
        return self._decoder.budget

    @budget.setter
    def budget(self, nodes: int | Literal["auto"]) -> None:
        self._decoder.budget = nodes

    @property
    def models(self) -> dict[str, object]:
        """Whose keys and values a dialogue keeps, by role."""
        models: dict[str, object] = {"target": self._target}
        return models if self._draft is None else {**models, "drafter": self._draft}

    @property
    def room(self) -> Room:
        """How many texts may be held side by side."""
        return self._room

    def progress(self) -> Progress:
        """Where the running sweep is. Cheap, and safe from any thread."""
        done = min(self._decoder.layers_done, self._stream.layers)
        return Progress(done, self._stream.layers, self._decoder.sweeps, self._stream.stats().bytes_read)

    # What it does

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        caches: dict[object, KVCache] | None = None,
        written: Items[int] = (),
    ) -> Iterator[Burst]:
        """Write an answer, one Burst for each sweep. Streams of one engine may be interleaved: they share sweeps.

        `caches` carries keys and values from one call to the next; what both texts share is not processed again.
        `written` is the beginning of the answer, from an earlier call: bursts go on from there.
        """
        sequence = self._sequence(prompt, sampling or SamplingParams(), caches)
        if written:
            sequence.accept(Acceptance((), tuple(written)))
        return self._bursts_of(sequence)

    def generate(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Completion:
        """The whole answer at once."""
        result = next(self.generate_many([prompt], [sampling or SamplingParams()]))
        if isinstance(result, Failure):
            raise result.error
        return result

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        sampling: SamplingParams | Items[SamplingParams] | None = None,
        parallel: int | Literal["auto"] = "auto",
    ) -> Iterator[Result]:
        """One Completion or Failure for each prompt, as they finish; `index` says whose.

        One SamplingParams for all derives a seed for each item. `parallel` texts share every sweep; auto is as many as
        memory holds. None of this changes a text.
        """
        if isinstance(sampling, Items):
            each: Iterable[SamplingParams] = sampling
        else:
            shared = self.filled(sampling)
            each = (replace(shared, seed=derived_seed(shared.seed or 0, index)) for index in count())
        requests = (
            Request(index, *item) for index, item in enumerate(zip(prompts, each, strict=isinstance(sampling, Items)))
        )
        return iter(self.batch(requests, parallel))

    def batch(self, requests: Iterable[Request], parallel: int | Literal["auto"] = "auto") -> Batch:
        """The same for callers that look on, sweep by sweep, and may continue what an earlier run began."""
        most = MOST_PARALLEL if parallel == "auto" else parallel
        return Batch(self._decoder, self._sequence, self._room, requests, most)

    def grammar(self, text: str) -> Grammar:
        """Read what `grammar.json_schema` or `grammar.regex` made, or Lark, for SamplingParams.grammar.

        Safe from any thread. Raises BadGrammar.
        """
        return self._grammars.grammar(text)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self._target.vocabulary, self._stop_tokens)

    def conversation(self, system: str | None = None) -> Conversation:
        """A dialogue that keeps its keys and values from turn to turn."""
        return Conversation(self, system)

    # For callers that drive the sweeps themselves, such as a server: texts join and leave between two sweeps

    def join(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        caches: dict[object, KVCache] | None = None,
    ) -> Sequence:
        """Begin a text; every `sweep` from the next one on writes at it, until its finish_reason is set."""
        sequence = self._sequence(prompt, sampling or SamplingParams(), caches)
        self._decoder.join(sequence)
        return sequence

    def sweep(self, kept: Items[int] = ()) -> list[Step]:
        """One sweep over all texts that have joined; after an error none of them has moved.

        `kept` are the lengths of texts whose caches the caller keeps beside them.
        """
        return self._decoder.step(kept)

    def leave(self, sequence: Sequence) -> None:
        """Stop writing a text, if it has not ended already; its caches stay good for another one."""
        if sequence in self._decoder.live:
            self._decoder.leave(sequence)

    def scores(self, prompt: Prompt, answer: Items[int], sampling: SamplingParams) -> Tensor:
        """What the choice after `prompt` + `answer` compares, processed afresh: logits + T · G, [V] float32."""
        sequence = self._sequence([*self.encode(prompt), *answer], sampling)
        (hidden_RH,) = self._target.forward([Rows(KVCache(), sequence.tokens, range(-1, len(sequence.tokens) - 1))])
        if sequence.parse is not None:
            sequence.parse.advance(answer)
        logits_NV = self._target.head(hidden_RH[-1:])
        (logits_V,) = constrained(logits_NV, sequence.sampling, sequence.parse, TokenTree.empty(), [ROOT])
        history = History.of(self.encode(prompt), answer)
        return compared(logits_V, sequence.sampling, history, sequence.noise, len(sequence.tokens))

    def pack(self) -> dict[str, Floats]:
        """What decoding taught so far: how far to trust whom ("drafter/…"), what sweeps and passes cost ("cost/…")."""
        return packed(self._decoder.drafter, "drafter") | packed(self._decoder.cost, "cost")

    def unpack(self, arrays: Arrays) -> None:
        """Begin where an earlier engine of the same pair ended; texts stay what they are, only guesses get better.

        Raises ValueError for numbers that this engine cannot have learned.
        """
        unpack(self._decoder.drafter, "drafter", arrays)
        unpack(self._decoder.cost, "cost", arrays)

    def likelihoods(self, asked: Items[Continuation]) -> Iterator[tuple[int, Likelihood]]:
        """How likely the target itself finds each continuation, with its index, as sweeps end; no drafter takes part.

        A sweep carries as many texts as memory holds, and computes what begins alike once.
        """
        longest = max((len(one.read) for one in asked), default=0)
        if longest > self.context:
            raise ContextLengthExceeded(f"a text has {longest + 1:,} tokens, the context is {self.context:,}.")
        trees = isinstance(self._target, TreeLM)
        return likelihoods(
            self._target, asked, lambda rows: sum(rows) <= self.context or self._room.holds(rows, 0), trees
        )

    def stop(self) -> None:
        """End all running streams after the current layer; what they wrote stays. Safe in a signal handler."""
        self._decoder.stop()

    def close(self) -> None:
        """Stop threads and let go of the weights."""
        self._target.close()
        if self._draft is not None:
            self._draft.close()
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # How

    def _sequence(
        self, prompt: Prompt, sampling: SamplingParams, caches: dict[object, KVCache] | None = None
    ) -> Sequence:
        tokens = self.encode(prompt)
        if not tokens:
            raise EmptyPrompt("the prompt is empty.")
        if len(tokens) >= self.context:
            raise ContextLengthExceeded(
                f"the prompt has {len(tokens):,} tokens, the context is {self.context:,}.",
                hint=f"--ctx {len(tokens) + sampling.max_tokens} if the model allows it, or a shorter prompt.",
            )
        beyond = [token for token, _ in sampling.logit_bias if not 0 <= token < self._target.vocabulary]
        if beyond:
            raise BadSampling(f"logit_bias names token {beyond[0]}; this model has 0 to {self._target.vocabulary - 1}.")
        filled = self.filled(sampling)
        noise = Noise(filled.seed or 0, self._target.vocabulary, self._target.device)
        return sequences.start(tokens, filled, noise, self.decode, self._stop_tokens, self.context, caches)

    def filled(self, sampling: SamplingParams | None) -> SamplingParams:
        """With the model's own wishes where nothing was asked for."""
        return filled(sampling or SamplingParams(), self._model.generation_config)

    def _bursts_of(self, sequence: Sequence) -> Iterator[Burst]:
        self._bursts[sequence] = deque()
        self._decoder.join(sequence)
        try:
            while sequence.finish_reason is None or self._bursts[sequence]:
                while not self._bursts[sequence]:
                    for step in self._decoder.step():
                        self._bursts[step.sequence].append(step.burst)
                yield self._bursts[sequence].popleft()
            if sequence.failure is not None:
                raise sequence.failure
        finally:
            del self._bursts[sequence]
            if sequence in self._decoder.live:  # the reader left early, or the sweep failed
                self._decoder.leave(sequence)
