"""An engine without a model: letters are tokens, answers are echoes, and every right guess has a wrong one beside it.

Has the surface of specexec.engine.engine, so that the commands can be tried in milliseconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import ClassVar, Literal

from offload.placement.placement import Need, Placement
from specexec.engine.prefixes import NoPrefixes, Prefixes
from specexec.engine.request_types import Failure, Partial, Request
from specexec.engine.step_accounting import StepAccounting
from specexec.errors import ContextLengthExceeded, EmptyPrompt
from specexec.learned import Arrays
from specexec.sampling.model_defaults import defaults_of
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Completion, Cost, Progress
from specexec.text.detokenizer import TextStream
from specexec.text.formats import Format
from specexec.text.messages import Prompt
from specexec.text.reply import Reply
from specexec.text.template_options import Wishes
from specexec.text.transcript import NOTHING, Kept
from specexec.tree.tree import Floats, TokenTree

SIZES = (1, 4, 2)  # tokens per sweep, over and over


class FakeTokenizer:
    """Letters, none of them special."""

    all_special_ids: ClassVar[list[int]] = []
    eos_token_id: int | None = None

    def get_added_vocab(self) -> dict[str, int]:
        return {}


class FakeEncoding:
    """Knows no template."""

    template = None
    tokenizer = FakeTokenizer()

    def __init__(self) -> None:
        self.thinking: Mapping[str, object] = {}

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)

    def stream(self, before: Sequence[int]) -> TextStream:
        return TextStream(self.decode)

    def spell(self, token: int) -> str:
        return chr(token)

    def encode_rest(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def render(self, messages: Sequence[dict[str, object]], wishes: Wishes | None = None) -> str:
        raise ValueError("no template")

    def template_for(self, wishes: Wishes) -> str:
        raise ValueError("no template")


_NEED = Need((10,) * 5, (10,) * 5, embeddings_B=4, norms_B=1, head_B=0, cache_B=50, ctx=200)


class FakeWeights:
    """Five layers that stream from disk."""

    placement = Placement(("disk",) * 5, ("device",) * 5, 3, _NEED, on_gpu=False)

    def __init__(self, bytes_per_sweep: int) -> None:
        self.bytes_per_sweep = bytes_per_sweep


class FakeEngine:
    """Answers `hello` with `echo: hello`, `bytes_per_sweep` bytes a sweep."""

    name = "demo"
    toy = True
    own_code = False
    compute = "float"
    kv_quant: int | None = None
    lossy: tuple[str, ...] = ()
    adapters: Mapping[str, tuple[str, ...]] = MappingProxyType({"target": ()})
    drafter_name = "demo drafter"
    drafter_failures: ClassVar[dict[str, str]] = {}
    placement = "disk: 5 layers stream, 0.3 MB resident"
    device = "CPU"
    context = 200
    dtype, exact_ties = "float32", None
    sources, reason = "sibling+ngram", ""
    models: ClassVar[dict[str, object]] = {}
    folders: ClassVar[dict[str, Path]] = {}

    def __init__(self, *, bytes_per_sweep: int = 0, sweep_s: float = 0.0, quick: int = 0, deaf: bool = False) -> None:
        """The first `quick` sweeps of a text take no time, the others `sweep_s` seconds."""
        self.budget: int | str = 64
        self.memory = None
        self.prefixes: Prefixes = NoPrefixes()
        self.accounting = StepAccounting()
        self.closed = False
        self.encoding = FakeEncoding()
        self.weights = FakeWeights(bytes_per_sweep)
        self.asked: list[tuple[object, SamplingParams]] = []
        self._bytes = bytes_per_sweep
        self._sweep_s, self._quick = sweep_s, quick
        self.slow = threading.Event()  # a sweep that takes its time has begun
        self._deaf = deaf
        self._stopped = False

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def encode(self, prompt: str) -> list[int]:
        return [ord(letter) for letter in prompt]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)

    def filled(self, sampling: SamplingParams) -> SamplingParams:
        return replace(defaults_of(None).filled(sampling), seed=sampling.seed)

    def stop(self) -> None:
        self._stopped = not self._deaf

    def progress(self) -> Progress:
        return Progress(layer=2, layers=5, sweeps=1, bytes_read=0)

    def stream(self, prompt: Prompt, sampling: SamplingParams, written: Sequence[int] = ()) -> Iterator[Burst]:
        self.asked.append((prompt, sampling))
        self._stopped = False
        words = self._words(prompt)
        if not words:
            raise EmptyPrompt("the prompt is empty.")
        if len(words) > self.context:
            raise ContextLengthExceeded(f"the prompt has {len(words)} tokens, the context is {self.context}.")
        answer = f"echo: {words}"[: sampling.max_tokens]
        assert answer.startswith(self.decode(written)), "an answer goes on from its own beginning"
        at, sweep = len(written), 0
        while at < len(answer):
            if self._interrupted(0.0 if sweep < self._quick else self._sweep_s):
                yield self._burst("", "", "interrupted", sampling)
                return
            size = SIZES[sweep % len(SIZES)]
            text = answer[at : at + size]
            at, sweep = at + size, sweep + 1
            done = at >= len(answer)
            reason: Literal["length", "stop"] = "length" if sampling.max_tokens == len(answer) else "stop"
            yield self._burst(text, answer[at - size :], reason if done else None, sampling)

    def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        return self.completion(prompt, list(self.stream(prompt, sampling)), 0)

    def completion(self, prompt: Prompt, bursts: list[Burst], index: int) -> Completion:
        return Completion(
            index=index,
            text="".join(burst.text for burst in bursts),
            tokens=tuple(token for burst in bursts for token in burst.tokens),
            finish_reason=bursts[-1].finish_reason or "stop",
            prompt_tokens=len(self._words(prompt)),
            seed=bursts[-1].seed,
            sweeps=sum(bool(burst.tokens) for burst in bursts),
            nodes=sum(burst.nodes for burst in bursts),
            accepted=sum(burst.accepted for burst in bursts),
            bytes_read=sum(burst.bytes_read for burst in bursts),
            seconds=0.25,
        )

    def batch(self, requests: Iterable[Request], parallel: int | Literal["auto"] = "auto") -> FakeBatch:
        return FakeBatch(self, iter(requests), 4 if parallel == "auto" else parallel)

    def pack(self) -> dict[str, Floats]:
        return {}

    def unpack(self, arrays: Arrays) -> None:
        raise AssertionError("nothing was packed")

    def conversation(self, system: str | None = None) -> FakeConversation:
        return FakeConversation(self, system)

    def _interrupted(self, seconds: float) -> bool:
        if seconds:
            self.slow.set()
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not self._stopped:
            time.sleep(0.005)
        return self._stopped

    def _words(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        last = prompt[-1] if prompt else ""
        return (
            str(last["content"]) if isinstance(last, dict) else self.decode([t for t in prompt if isinstance(t, int)])
        )

    def _burst(
        self, text: str, ahead: str, reason: Literal["stop", "length", "interrupted"] | None, sampling: SamplingParams
    ) -> Burst:
        tokens = tuple(ord(letter) for letter in text)
        guessed = tokens[:-1]
        # The accepted chain, and one wrong guess (`?`) beside every node of it.
        parents = [parent for at in range(len(guessed)) for parent in (2 * at - 2 if at else -1,) * 2]
        tree = TokenTree.of([token for right in guessed for token in (right, ord("?"))], parents)
        return Burst(
            tokens=tokens,
            text=text,
            finish_reason=reason,
            tree=tree if tokens else TokenTree.empty(),
            path=tuple(range(0, 2 * len(guessed), 2)),
            seed=42 if sampling.seed is None else sampling.seed,
            cost=Cost(sweep_s=0.5, bytes_read=self._bytes),
        )


class FakeBatch:
    """A few answers at a time, a burst each per sweep."""

    def __init__(self, engine: FakeEngine, requests: Iterator[Request], parallel: int) -> None:
        self.done = False
        self.sweeps = 0
        self._engine = engine
        self._requests = requests
        self._parallel = parallel
        self._live: dict[int, tuple[Request, Iterator[Burst], list[Burst]]] = {}

    @property
    def partial(self) -> list[Partial]:
        live = self._live.values()
        return [
            Partial(one.index, (*one.written, *(t for burst in bursts for t in burst.tokens)))
            for one, _, bursts in live
        ]

    def sweep(self) -> list[Completion | Failure]:
        results: list[Completion | Failure] = []
        while len(self._live) < self._parallel and (new := next(self._requests, None)):
            self._live[new.index] = (
                new,
                self._engine.stream(new.prompt, new.sampling, *[new.written] * bool(new.written)),
                [],
            )
        self.sweeps += bool(self._live)
        self.done |= not self._live
        for at, (request, stream, bursts) in list(self._live.items()):
            try:
                bursts.append(next(stream))
            except (EmptyPrompt, ContextLengthExceeded) as error:
                del self._live[at]
                results.append(Failure(at, error))
                continue
            if bursts[-1].finish_reason:
                del self._live[at]
                whole = self._engine.completion(request.prompt, bursts, at)
                begun = self._engine.decode(request.written)
                results.append(replace(whole, text=begun + whole.text, tokens=(*request.written, *whole.tokens)))
                self.done |= bursts[-1].finish_reason == "interrupted"
        return results

    def close(self) -> None:
        self._live.clear()


class FakeConversation:
    """Turns are kept, partial answers too. `thinks` are the marks of a thought, `cue` is the end of every prompt."""

    thinks = ("", "")
    cue = ""
    rendered = ""
    can_proceed = False

    def __init__(self, engine: FakeEngine, system: str | None) -> None:
        self.system = system
        self.messages: list[dict[str, object]] = []
        self.unanswered: str | None = None
        self.left_out = NOTHING
        self._engine = engine

    @property
    def tokens_used(self) -> int:
        return sum(len(str(message["content"])) for message in self.messages)

    def send(self, text: str, sampling: SamplingParams) -> Iterator[Burst]:
        self.unanswered = text
        form = Format(self._engine.encoding, None, self.thinks)
        reply = Reply(form, self._engine.encode(self.cue))
        for burst in self._engine.stream([{"role": "user", "content": text}], sampling):
            piece = reply.add(burst.tokens, last=burst.finish_reason is not None)
            if burst.tokens and self.unanswered is not None:
                self.messages += [{"role": "user", "content": text}, {}]
                self.unanswered = None
            if self.unanswered is None:
                self.messages[-1] = reply.message
            yield replace(burst, piece=piece)

    def undo(self) -> bool:
        undone = self.unanswered is not None or bool(self.messages)
        if self.unanswered is None:
            del self.messages[-2:]
        self.unanswered = None
        return undone

    def retry(self, sampling: SamplingParams) -> Iterator[Burst]:
        text = self.unanswered or str(self.messages[-2]["content"])
        self.undo()
        return self.send(text, sampling)

    def proceed(self, sampling: SamplingParams) -> Iterator[Burst]:
        return iter(())

    def keep(self) -> Kept:
        return Kept([*self.messages], self.system, [])

    def take_up(self, kept: Kept) -> None:
        self.messages, self.system = kept.messages, kept.system

    def clear(self) -> None:
        self.messages.clear()

    def like(self, other: FakeConversation) -> None:
        pass
