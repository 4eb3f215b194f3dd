"""A target, its drafter and the loop as one object. Knows no file and no device: compose makes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from specexec.drafters.auto import calibrated, failures
from specexec.drafters.calibration import Calibration
from specexec.engine.batch import MOST_PARALLEL, Batch
from specexec.engine.decoder import Decoder, Step
from specexec.engine.embeddings import Pooling, embeddings
from specexec.engine.likelihoods import likelihoods
from specexec.engine.parts import Parts, Weights
from specexec.engine.prefixes import Prefixes
from specexec.engine.readings import TextReader, TextReading, shared_tensors
from specexec.engine.request_types import Continuation, Failure, Likelihood, Request, Result
from specexec.engine.requests import Intake, check_ids
from specexec.engine.shared_stream import Readers
from specexec.engine.step_accounting import StepAccounting
from specexec.errors import BadOption, ContextLengthExceeded, EmptyPrompt, UnsupportedArchitecture
from specexec.learned import Arrays, packed, unpack
from specexec.model.cache import KVCache
from specexec.model.exact_ties import ExactTies
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.memory_room import Room
from specexec.sampling.params import SamplingParams, derived_seed
from specexec.sampling.scores import compared, constrained
from specexec.sampling.verify import Acceptance
from specexec.sizes import HEAD_ROWS, check_budget
from specexec.stats import Burst, Completion, Progress
from specexec.text.conversation import Conversation
from specexec.text.messages import Prompt
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, TokenTree


class Engine:
    """A target, its drafter and the loop, ready to write. A context manager; `close` frees memory and threads.

    Any number of threads may call `generate`, `generate_many`, `stream`, `likelihoods` and the rest at once, also while
    streams are open: sweeps run one at a time, each writes at all open texts, and no text depends on another. A stream
    that pauses or is dropped delays no other, but is written on until it ends or is closed. One conversation, and one
    `caches`, serves one thread at a time. `accounting` says what sweeps cost and how fast texts were written. After
    `close` every call raises EngineClosed.
    """

    def __init__(self, parts: Parts) -> None:
        self.name, self.toy, self.folders = parts.name, parts.toy, parts.folders
        self.encoding = parts.encoding
        self.tokenizer = parts.encoding.tokenizer
        self.encode, self.decode = parts.encoding.encode, parts.encoding.decode
        self.context, self.memory = parts.context, parts.memory
        self._room = parts.room
        self._model, self._stream = parts.model, parts.stream
        self._target, self._drafts = parts.target, parts.drafts
        self.sources, self.reason, self.own_code = parts.sources, parts.reason, parts.own_code
        self.compute, self.kv_quant, self.adapters = parts.compute, parts.kv_quant, parts.adapters
        self.lossy = parts.lossy
        self.exact_ties = ExactTies(parts.target, parts.model.dtype) if parts.exact else None
        self.accounting = StepAccounting(parts.stream.stats, parts.cost)
        self._decoder = Decoder(
            parts.target,
            parts.drafter,
            parts.planner,
            parts.budget,
            self.accounting,
            exact_ties=self.exact_ties,
            unwaited=parts.stream.unwaited,
            room=parts.room,
            walk=parts.walk,
            thin=parts.thin,
        )
        self._readers, self._shorten, self._thin = Readers(self._decoder), parts.shorten, parts.thin
        self._intake = Intake(parts.encoding, parts.target, parts.defaults, parts.context, self._shortened)
        self.filled, self.grammar = self._intake.filled, self._intake.grammar
        self._driven = self._readers.caller()

    # What it is

    @property
    def drafter_name(self) -> str:
        return self._decoder.drafter.name

    @property
    def drafter_failures(self) -> dict[str, str]:
        """Why drafters failed last, by name: where they did, texts took more sweeps. Usually empty."""
        return failures(self._decoder.guarded)

    def calibration(self, sampling: SamplingParams) -> Calibration | None:
        """What was learned about the scores of the first drafter model at this temperature; None if no model drafts."""
        model = calibrated(self._decoder.drafter)
        return None if model is None else model.calibration(sampling)

    @property
    def device(self) -> str:
        return str(self._target.device)

    @property
    def architecture(self) -> str:
        """transformers' name for the kind of model."""
        return str(self._model.config.model_type)

    @property
    def model_class(self) -> str:
        """transformers' class of the target."""
        return type(self._model).__name__

    @property
    def dtype(self) -> str:
        """The number format that the target computes in."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """Ids that the target has a row for; its tokenizer may know fewer, or more."""
        return self._target.vocabulary

    @property
    def width(self) -> int:
        """Numbers of a hidden state, and so of an embedding."""
        return int(self._model.config.hidden_size)

    @property
    def weights(self) -> Weights:
        """The target's weights as they stream."""
        return self._stream

    @property
    def placement(self) -> str:
        """One line: where the weights live and what a sweep moves."""
        return self._stream.placement.summary

    @property
    def budget(self) -> int | Literal["auto"]:
        """Guesses checked per sweep and sequence; 0 is plain decoding, auto as many as pay for themselves."""
        return self._decoder.limit.budget

    @budget.setter
    def budget(self, nodes: int | Literal["auto"]) -> None:
        check_budget(nodes)
        self._decoder.limit.budget = nodes

    @property
    def prefixes(self) -> Prefixes:
        """Keys and values of earlier texts, of any run: at first nothing is kept."""
        return self._readers.prefixes

    @prefixes.setter
    def prefixes(self, prefixes: Prefixes) -> None:
        self._readers.prefixes = prefixes

    @property
    def models(self) -> dict[str, TreeLM]:
        """Whose keys and values are ours to keep, by role."""
        return {"target": self._target, **self._drafts} if isinstance(self._target, TreeLM) else {}

    @property
    def room(self) -> Room:
        """How many texts may be held side by side."""
        return self._room

    def progress(self) -> Progress:
        """Where the running sweep is. Cheap, and safe from any thread."""
        done = min(self.accounting.layers_done, self._stream.layers)
        return Progress(done, self._stream.layers, self.accounting.sweeps, self._stream.stats().bytes_read)

    # What it does

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        caches: dict[object, KVCache] | None = None,
        written: Items[int] = (),
    ) -> Iterator[Burst]:
        """Write an answer, one Burst for each sweep. Streams of one engine may be interleaved: they share sweeps.
        Raises at once EmptyPrompt, BadText, BadMessages, UnknownToken, ContextLengthExceeded or BadSampling for what
        cannot be written; while it is read EngineClosed, BrokenLogits, BadGrammar or offload's ReadFailed.

        `caches` carries keys and values from one call to the next; what both texts share is not processed again.
        `written` is the beginning of the answer, from an earlier call: bursts continue from there.
        """
        sequence = self._intake.sequence(prompt, sampling or SamplingParams(), caches, written=written)
        if written:
            sequence.accept(Acceptance((), tuple(written)))
        return self._readers.read(sequence)

    def generate(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Completion:
        """The whole answer at once. Raises as `stream` does."""
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
        """One Completion or Failure for each prompt, as they finish; `index` is the prompt's place.

        One SamplingParams for all derives a seed for each item. `parallel` texts share every sweep; auto is as many as
        memory holds. None of this changes a text. A prompt that cannot be answered is a Failure; errors of the sweep
        (ReadFailed, EngineClosed) and a `parallel` that cannot be (BadOption) are raised.
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
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise BadOption(f"parallel is {parallel!r}; allowed: 'auto' or 1 and more.")
        caller, lock = self._readers.caller(), self._readers.lock
        return Batch(caller, self._intake.requested, self._room, requests, most, lock)

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
        sequence = self._intake.sequence(prompt, sampling or SamplingParams(), caches)
        self._driven.join(sequence)
        return sequence

    def sweep(self, kept: Items[int] = ()) -> list[Step]:
        """One sweep over all texts that have joined; after an error none of them has moved.

        `kept` are the lengths of texts whose caches the caller keeps beside them.
        """
        return self._driven.step(kept)

    def leave(self, sequence: Sequence) -> None:
        """Stop writing a text, if it has not ended already; its caches stay good for another one."""
        self._driven.leave(sequence)

    def scores(self, prompt: Prompt, answer: Items[int], sampling: SamplingParams) -> Tensor:
        """What the choice after `prompt` + `answer` compares, in a sweep of its own: logits + T · G, [V] float32."""
        sequence = self._intake.sequence(prompt, sampling, written=answer)
        sequence.tokens += answer
        with self._readers.lock:
            (hidden_RH,) = self._target.forward([Rows.text(KVCache(), sequence.tokens)])
        if sequence.parse is not None:
            sequence.parse.advance(answer)
        logits_NV = self._target.head(hidden_RH[-1:])
        (logits_V,) = constrained(logits_NV, sequence.sampling, sequence.parse, TokenTree.empty(), [ROOT])
        return compared(logits_V, sequence.sampling, sequence.history, sequence.noise, len(sequence.tokens))

    def log_probs_along(
        self, prompt: Prompt, answer: Items[int], sampling: SamplingParams, *, kv_whole: bool = False
    ) -> Iterator[Tensor]:
        """What the model finds of every token at each place of `answer`, in a sweep of its own: log-probabilities,
        [R, V] in float32, for some places at a time. `kv_whole`: as if `kv_quant` were None.
        """
        sequence = self._intake.sequence(prompt, sampling)
        before, cache = len(sequence.tokens), KVCache()
        whole = self._target.keeping_whole() if kv_whole and isinstance(self._target, TreeLM) else nullcontext()
        with self._readers.lock, whole:
            if kept := self._thin(sequence):
                (hidden_RH,) = self._target.forward([Rows.text(cache, sequence.tokens)])
                cache.commit(range(before))
                cache.thin(kept, before)
                (after_RH,) = self._target.forward([Rows.text(cache, answer)])
                hidden_RH = torch.cat([hidden_RH, after_RH])
            else:
                (hidden_RH,) = self._target.forward([Rows.text(cache, [*sequence.tokens, *answer])])
        for rows_RH in hidden_RH[before - 1 : -1].split(HEAD_ROWS):
            yield self._target.head(rows_RH).log_softmax(-1)

    def pack(self) -> dict[str, Floats]:
        """What was learned so far: the drafter's calibration ("drafter/…"), seconds of sweeps and passes ("cost/…")."""
        return packed(self._decoder.drafter, "drafter") | packed(self.accounting.cost, "cost")

    def unpack(self, arrays: Arrays) -> None:
        """Begin where an earlier engine of the same pair ended; texts stay what they are, only guesses get better.

        Raises ValueError for numbers that this engine cannot have learned.
        """
        unpack(self._decoder.drafter, "drafter", arrays)
        unpack(self.accounting.cost, "cost", arrays)

    def likelihoods(self, asked: Items[Continuation]) -> Iterator[tuple[int, Likelihood]]:
        """How likely the target itself finds each continuation, with its index, as sweeps end; without a drafter.

        A sweep carries as many texts as memory holds, and computes what begins alike once. Raises UnknownToken and
        ContextLengthExceeded before the first one.
        """
        for number, one in enumerate(asked):
            check_ids([*one.context, *one.tokens], self._target.vocabulary, f"text {number}")
        longest = max((len(one.read) for one in asked), default=0)
        if longest > self.context:
            raise ContextLengthExceeded(f"a text has {longest + 1:,} tokens, the context is {self.context:,}.")
        trees = isinstance(self._target, TreeLM)
        found = likelihoods(
            self._target, asked, lambda rows: sum(rows) <= self.context or self._room.holds(rows, 0), trees
        )
        return self._readers.one_by_one(found)

    def embeddings(
        self, texts: Items[str | list[int]], pooling: Pooling = "mean", kept: Items[int] = ()
    ) -> Iterator[Tensor]:
        """A vector of length 1 for each text or list of token ids, [H] float32, as sweeps end; without a drafter.

        It pools the model's final hidden states: of all tokens, or of the last one. A sweep carries as many texts as
        memory holds beside texts of the lengths in `kept`. Raises EmptyPrompt, BadText, UnknownToken and
        ContextLengthExceeded before the first one.
        """
        read = [self._checked(number, self.encode(text)) for number, text in enumerate(texts)]
        found = embeddings(self._target, read, pooling, lambda sizes: self._room.holds([*kept, *sizes], 0))
        return self._readers.one_by_one(found)

    def read(
        self, texts: Items[list[int]], layers: Items[int], top: int, kept: Items[int] = ()
    ) -> Iterator[TextReading]:
        """The target's hidden states and `top` likeliest tokens along each text of token ids, as sweeps end.

        `layers` are those whose inputs are wanted; as many as the model has is what its last layer makes, before the
        norm. `kept` and errors as in `embeddings`, and UnsupportedArchitecture for a model that takes no trees, or has
        no such layer.
        """
        read = [self._checked(number, text) for number, text in enumerate(texts)]
        reader = TextReader(self._tree_target, layers, top)
        return self._readers.one_by_one(reader.read(read, lambda sizes: self._room.holds([*kept, *sizes], 0)))

    def shared_tensors(self) -> dict[str, Tensor]:
        """The target's embeddings, last norm and head, as heads have them (readings.py). Raises as `read` does."""
        return shared_tensors(self._tree_target)

    def _shortened(self, tokens: list[int]) -> list[int]:
        with self._readers.lock:  # a drafter that chooses among them takes no part in a sweep meanwhile
            return self._shorten(tokens)

    @property
    def _tree_target(self) -> TreeLM:
        if not isinstance(self._target, TreeLM):
            raise UnsupportedArchitecture("this model decodes plainly here: no hidden states can be read inside it.")
        return self._target

    def _checked(self, number: int, tokens: list[int]) -> list[int]:
        if not tokens:
            raise EmptyPrompt(f"text {number} is empty.")
        check_ids(tokens, self._target.vocabulary, f"text {number}")
        if len(tokens) > self.context:
            raise ContextLengthExceeded(f"text {number} has {len(tokens):,} tokens, the context is {self.context:,}.")
        return tokens

    def stop(self) -> None:
        """End all running streams after the current layer; what they wrote stays. Safe in a signal handler."""
        self._decoder.stop()

    def close(self) -> None:
        """Stop threads and let go of the weights."""
        with self._readers.lock:
            self._readers.closed = True
        self._target.close()
        for draft in self._drafts.values():
            draft.close()
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
