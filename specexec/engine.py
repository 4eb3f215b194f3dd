"""The composition root: names, placement, target, drafter and decoder become one Engine. Only here is offload known."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import count
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

import offload as weights
from specexec import sequence as sequences
from specexec.architecture import check_tree_support, longest_text
from specexec.batch import MOST_PARALLEL, Batch
from specexec.cache import KVCache
from specexec.chain import ChainLM
from specexec.conversation import Conversation, Prompt
from specexec.decoder import Decoder, Step
from specexec.drafters import Drafter
from specexec.drafters.choice import Choice, join, parse
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import SAMPLE, SHARE, best_layers, preferred, skipping
from specexec.drafters.substitute import BITS, quantised, substituting
from specexec.encoding import Encoding, check_vocabularies
from specexec.errors import BadDrafter, ContextLengthExceeded, EmptyPrompt, UnsupportedArchitecture
from specexec.lm import Rows, TreeLM
from specexec.memory import Memory
from specexec.noise import Noise, derived_seed
from specexec.planners import planner_of, ranking_of
from specexec.room import Room
from specexec.sampling import History, SamplingParams, penalise, restrict, with_noise
from specexec.sequence import Sequence
from specexec.stats import Burst, Completion, Progress
from specexec.walk import Acceptance
from specexec.work import Failure, Request, Result

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 8192
TOY_BUDGET = 32  # a pass of the toy is all overhead, so no guess would ever pay: it shows the engine instead
DTYPES = {"auto": None, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Engine:
    """A target, its drafter and the loop, ready to write. A context manager; `close` frees memory and threads."""

    def __init__(
        self,
        model: PreTrainedModel,
        encoding: Encoding,
        draft_model: PreTrainedModel | None,
        pair: weights.ModelPair,
        choice: Choice,
        planner: str,
        budget: int | Literal["auto"],
        context: int,
        room: Room,
    ) -> None:
        self.name = pair.name
        self.toy = pair.toy
        self.folders = {"target": pair.target} | ({} if pair.drafter is None else {"drafter": pair.drafter})
        self.encoding = encoding
        self.tokenizer = encoding.tokenizer
        self.encode, self.decode = encoding.encode, encoding.decode
        self.context = context
        self._room = room
        self._model = model
        self._stream = weights.stream_of(model)
        self._target = _target(model)
        self._draft = TreeLM(draft_model) if draft_model is not None else None
        self.memory = Memory() if "ngram" in choice.sources else None
        makers: dict[str, Callable[[], Drafter]] = {
            "sibling": lambda: self._sibling(pair, planner),
            "substitute": lambda: self._substitute(planner),
            "skip": lambda: self._skip(planner),
            "ngram": lambda: NgramDrafter(self.memory),
        }
        drafter = join(choice, makers, {})
        self._decoder = Decoder(self._target, drafter, planner_of(planner), budget, self._stream.stats)
        self._bursts: dict[Sequence, deque[Burst]] = {}
        self._stop_tokens = _stop_tokens(model, encoding)

    # What it is

    @property
    def drafter_name(self) -> str:
        return self._decoder.drafter.name

    @property
    def device(self) -> str:
        return str(self._target.device)

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
            shared = self._filled(sampling)
            each = (replace(shared, seed=derived_seed(shared.seed or 0, index)) for index in count())
        requests = (
            Request(index, *item) for index, item in enumerate(zip(prompts, each, strict=isinstance(sampling, Items)))
        )
        return iter(self.batch(requests, parallel))

    def batch(self, requests: Iterable[Request], parallel: int | Literal["auto"] = "auto") -> Batch:
        """The same for callers that look on, sweep by sweep, and may continue what an earlier run began."""
        most = MOST_PARALLEL if parallel == "auto" else parallel
        return Batch(self._decoder, self._sequence, self._room, requests, most)

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

    def sweep(self) -> list[Step]:
        """One sweep over all texts that have joined; after an error none of them has moved."""
        return self._decoder.step()

    def leave(self, sequence: Sequence) -> None:
        """Stop writing a text, if it has not ended already; its caches stay good for another one."""
        if sequence in self._decoder.live:
            self._decoder.leave(sequence)

    def scores(self, prompt: Prompt, answer: Items[int], sampling: SamplingParams) -> Tensor:
        """What the choice after `prompt` + `answer` compares, processed afresh: logits + T · G, [V] float32."""
        sequence = self._sequence([*self.encode(prompt), *answer], sampling)
        (hidden_RH,) = self._target.forward([Rows(KVCache(), sequence.tokens, range(-1, len(sequence.tokens) - 1))])
        logits_V = penalise(
            self._target.head(hidden_RH[-1:])[0], sequence.sampling, History.of(self.encode(prompt), answer)
        )
        allowed_NV = restrict(logits_V.unsqueeze(0), sequence.sampling)
        temperature = sequence.sampling.temperature or 0.0
        return with_noise(allowed_NV, temperature, sequence.noise, [len(sequence.tokens)])[0]

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
        filled = self._filled(sampling)
        noise = Noise(filled.seed or 0, self._target.vocabulary, self._target.device)
        return sequences.start(tokens, filled, noise, self.decode, self._stop_tokens, self.context, caches)

    def _filled(self, sampling: SamplingParams | None) -> SamplingParams:
        """Every None replaced by what the model wants, or by chance."""
        sampling = sampling or SamplingParams()
        wish = self._model.generation_config
        greedy = not getattr(wish, "do_sample", False)
        wanted = {
            "temperature": 0.0 if greedy else _or(getattr(wish, "temperature", None), 1.0),
            "top_k": 0 if greedy else _or(getattr(wish, "top_k", None), 0),
            "top_p": 1.0 if greedy else _or(getattr(wish, "top_p", None), 1.0),
            "min_p": 0.0 if greedy else _or(getattr(wish, "min_p", None), 0.0),
            "seed": secrets.randbits(32),
        }
        missing = {name: value for name, value in wanted.items() if getattr(sampling, name) is None}
        return replace(sampling, **missing)  # type: ignore[arg-type]  # each value has the type of its field

    def _sibling(self, pair: weights.ModelPair, planner: str) -> SiblingDrafter:
        assert self._draft is not None
        assert pair.drafter is not None
        name = f"{pair.name} drafter" if pair.toy else pair.drafter.name
        return SiblingDrafter(self._draft, len(self.tokenizer), ranking_of(planner), name=name)

    def _skip(self, planner: str) -> SiblingDrafter:
        resident = [tier == "device" for tier in self._stream.placement.tiers]
        kept = preferred(resident)
        assert isinstance(self._target, TreeLM)
        if all(resident):  # every set of layers is there already: look for a good one
            layers = {i: weights.standing_layer(self._model, i) for i in range(len(resident))}
            kept = best_layers(self._target, layers, kept, self.encode(SAMPLE))
        layers = {i: weights.standing_layer(self._model, i) for i in kept}
        return skipping(self._model, layers, len(self.tokenizer), ranking_of(planner))

    def _substitute(self, planner: str) -> SiblingDrafter:
        layers = {
            i: quantised(weights.standing_layer(self._model, i), self._target.device)
            for i in range(self._stream.layers)
        }
        return substituting(self._model, layers, len(self.tokenizer), ranking_of(planner))

    def _bursts_of(self, sequence: Sequence) -> Iterator[Burst]:
        self._bursts[sequence] = deque()
        self._decoder.join(sequence)
        try:
            while sequence.finish_reason is None or self._bursts[sequence]:
                while not self._bursts[sequence]:
                    for step in self._decoder.step():
                        self._bursts[step.sequence].append(step.burst)
                yield self._bursts[sequence].popleft()
        finally:
            del self._bursts[sequence]
            if sequence in self._decoder.live:  # the reader left early, or the sweep failed
                self._decoder.leave(sequence)


def load(
    model: str = "demo",
    *,
    drafter: str = "auto",
    offload: weights.Offload = "auto",
    budget: int | Literal["auto"] = "auto",
    planner: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    ctx: int | None = None,
    ram_B: int | None = None,
    vram_B: int | None = None,
    link_limit_Bps: float | None = None,
    offline: bool = False,
) -> Engine:
    """Find, place and load a target and its drafter.

    model: path, alias or hub name. drafter: auto, none, sources joined by + (sibling, substitute, skip, ngram), or a
    path or name in the sibling's place. offload: auto, none, ram or disk.
    budget: guesses per sweep, or auto. planner: best, reference, beam, sequoia. dtype: auto (stored), bf16, f16, f32.
    ram_B, vram_B: ceilings in bytes. link_limit_Bps throttles the weight stream.
    Raises offload's errors for models and memory, UnsupportedArchitecture for targets that cannot verify trees,
    TokenizerMismatch for a drafter that does not fit, ContextLengthExceeded for a ctx beyond the model's.
    """
    choice = parse(drafter)
    pair = weights.resolve(model, choice.pairing, offline=offline)
    if "sibling" in choice.sources and pair.drafter is None:
        choice = _without_sibling(choice, model)
    weights.open_folder(pair.target)  # whatever is wrong with the files is said before anything is built
    config = AutoConfig.from_pretrained(pair.target, local_files_only=True, trust_remote_code=False)
    if choice.sources:  # without a drafter there is no tree, and any decoder streams
        check_tree_support(_class_of(config), config)
    context = _context(ctx, longest_text(config))
    encoding = Encoding.of(pair.target)
    if pair.drafter is not None:
        check_vocabularies(encoding, Encoding.of(pair.drafter), pair.name, pair.drafter)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    given = weights.free_memory(where, ram_B, vram_B)
    target = weights.load(
        pair.target,
        offload,
        where,
        DTYPES[dtype],
        ram_B=ram_B,
        vram_B=vram_B,
        link_limit_Bps=link_limit_Bps,
        ctx=context,
        extra_B=_drafter_B(choice, pair),
    )
    draft = None if pair.drafter is None else weights.load(pair.drafter, "none", where, DTYPES[dtype], ctx=context)
    if pair.toy and budget == "auto" and link_limit_Bps is None:
        budget = TOY_BUDGET
    return Engine(target, encoding, draft, pair, choice, planner, budget, context, _room(given, target, draft))


def _room(given: weights.Free, target: PreTrainedModel, draft: PreTrainedModel | None) -> Room:
    """What is left for keys and values: the share the placement has set aside, and half of what nobody asked for."""
    plan = weights.stream_of(target).placement
    spare_B = given.ram_B - plan.host_B
    if given.vram_B is not None and plan.device_B is not None:
        spare_B = given.vram_B - plan.device_B
    models = [target] if draft is None else [target, draft]
    needs = [weights.stream_of(model).placement.need for model in models]
    return Room(plan.need.cache_B + max(spare_B, 0) // 2, sum(-(-need.cache_B // need.ctx) for need in needs))


def _drafter_B(choice: Choice, pair: weights.ModelPair) -> int:
    """Memory for what drafts beside the target. Skipping in a resident one is free, but it is not placed yet."""
    shares = {"skip": SHARE, "substitute": BITS / 16}
    target_B = sum(file.stat().st_size for file in pair.target.glob("*.safetensors"))
    own_B = sum(int(shares.get(source, 0) * target_B) for source in choice.sources)
    sibling = [] if pair.drafter is None else list(pair.drafter.glob("*.safetensors"))
    return own_B + sum(file.stat().st_size for file in sibling)


def _without_sibling(choice: Choice, model: str) -> Choice:
    if not choice.auto:
        raise BadDrafter(
            f"no drafter is paired with {model!r}, or it is not on this machine yet.",
            hint="--drafter ngram, or the path or name of a smaller model of the same family.",
        )
    log.warning("no drafter is paired with %s: guessing from what was written before (--drafter ngram).", model)
    return choice.without_sibling()


def encoding_of(model: str, *, offline: bool = False) -> Encoding:
    """The tokenizer of a model that need not be loaded."""
    return Encoding.of(weights.resolve(model, "none", offline=offline).target)


def _target(model: PreTrainedModel) -> TreeLM | ChainLM:
    """Trees where the architecture allows them; `load` has refused a drafter where it does not."""
    try:
        return TreeLM(model)
    except UnsupportedArchitecture:
        return ChainLM(model)


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The modelling class behind a config, without building it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitecture(
            f"architecture {config.model_type!r} is not a text-only causal language model that transformers knows."
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert isinstance(found, type), "one class for each config"
    return found


def _context(asked: int | None, longest: int) -> int:
    if asked is not None and asked > longest:
        raise ContextLengthExceeded(f"--ctx {asked:,} is more than the {longest:,} tokens the model was made for.")
    return asked or min(DEFAULT_CONTEXT, longest)


def _or(value: object, default: object) -> object:
    return default if value is None else value


def _stop_tokens(model: PreTrainedModel, encoding: Encoding) -> frozenset[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    from_model = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    from_tokenizer = [own] if isinstance(own := encoding.tokenizer.eos_token_id, int) else []
    return frozenset(from_model + from_tokenizer)
