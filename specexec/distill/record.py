"""A target answers prompts, and what training needs of its answers is kept on disk. Knows no screen.

Answers come from the batch engine, so from any placement, with any drafter. Each is then read once more, many in a
sweep: beside the sweeps that wrote them these are few.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from specexec.distill.recording import RecordedTarget, RecordedText, Recording
from specexec.engine.engine import Engine
from specexec.engine.request_types import Failure, Request
from specexec.errors import BadOption, BadRecording, SpecexecError
from specexec.stats import Completion

TOGETHER = 4096  # tokens of texts that are finished, but not read yet: an interruption costs no more
LEAST_LAYERS = 6  # below that the three layers of EAGLE-3 are no three


@dataclass(frozen=True)
class Recorded:
    """How far a recording is: what was kept since the last report, or one prompt that failed.

    `growing`: tokens of answers that are written, but not kept yet.
    """

    texts: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    growing: int = 0
    failure: tuple[int, SpecexecError] | None = None


def usual_taps(layers: int) -> tuple[int, ...]:
    """The inputs that an EAGLE-3 head reads where nothing else is said: of three layers, early, in the middle, late.

    As vLLM and `speculators` have them (Li et al. 2025); as far apart in a model too small for that.
    """
    return (2, layers // 2, layers - 3) if layers >= LEAST_LAYERS else tuple(sorted({0, layers // 2, layers - 1}))


def target_of(engine: Engine, name: str) -> RecordedTarget:
    """The model behind an engine, called by the name under which others may find it."""
    return RecordedTarget(
        name, engine.model_class, engine.width, engine.weights.layers, engine.vocabulary, engine.context,
        tokens_named(engine.tokenizer.get_vocab()),
    )  # fmt: skip


def tokens_named(vocabulary: Mapping[str, int]) -> str:
    """A name for what the ids of a tokenizer mean."""
    spelled = json.dumps(sorted(vocabulary.items(), key=lambda one: (one[1], one[0])))
    return hashlib.sha256(spelled.encode()).hexdigest()[:16]


def prompt_named(request: Request) -> str:
    """A name for what was asked."""
    return hashlib.sha256(repr((request.prompt, request.wishes, request.grammar)).encode()).hexdigest()[:16]


def check_taps(taps: Items[int], layers: int) -> None:
    """Raises BadOption for layers that there are not."""
    if not taps or any(not 0 <= tap < layers for tap in taps) or len(set(taps)) < len(taps):
        raise BadOption(f"layers {[*taps]} cannot be recorded: different ones from 0 to {layers - 1}.")


def left_to_record(recording: Recording, requests: Items[Request]) -> list[Request]:
    """Those whose texts are not there yet. Raises BadRecording where a text answers another prompt."""
    there = set(recording.texts)
    for request in requests:
        if request.index in there and recording.prompt_of(request.index) != prompt_named(request):
            raise BadRecording(
                f"text {request.index} of {recording.folder} answers another prompt than this file has there.",
                hint="the same prompts, with new ones behind them, or another -o.",
            )
    return [request for request in requests if request.index not in there]


def record(engine: Engine, requests: Items[Request], recording: Recording) -> Generator[Recorded, None, None]:
    """Answer each request, and keep its text as number `index`, in a recording that has begun; says what is kept.

    Raises what sweeps raise, and UnsupportedArchitecture for a model that takes no trees. What was kept stays, answers
    that were begun are gone on with; `left_to_record` says what is left.
    """
    named = {request.index: prompt_named(request) for request in requests}
    before = {text: tokens for text, (prompt, tokens) in recording.begun().items() if named.get(text) == prompt}
    asked = {request.index: replace(request, written=before.get(request.index, ())) for request in requests}
    batch = engine.batch(asked.values())
    waiting = list[Completion]()
    begun = dict[int, tuple[int, ...]]()
    try:
        while not batch.done:
            for result in batch.sweep():
                if isinstance(result, Failure):
                    yield Recorded(failure=(result.index, result.error))
                elif result.finish_reason == "interrupted":
                    begun[result.index] = result.tokens
                elif result.tokens:
                    waiting.append(result)
            tokens = sum(one.prompt_tokens + len(one.tokens) for one in waiting)
            if waiting and (batch.done or tokens >= TOGETHER):
                yield _kept(engine, recording, [(asked[one.index], one) for one in waiting], batch.lengths)
                waiting = []
            growing = sum(len(one.tokens) for one in waiting) + sum(len(one.tokens) for one in batch.partial)
            yield Recorded(growing=growing)
    finally:
        begun = before | begun | {one.index: one.tokens for one in batch.partial}
        begun |= {one.index: one.tokens for one in waiting}
        there = set(recording.texts)
        recording.set_aside({text: (named[text], tokens) for text, tokens in begun.items() if text not in there})
        batch.close()


def _kept(
    engine: Engine, recording: Recording, answered: list[tuple[Request, Completion]], beside: list[int]
) -> Recorded:
    """These texts, read and written."""
    prompts = [engine.encode(request.prompt, request.wishes) for request, _ in answered]
    texts = [[*prompt, *one.tokens] for prompt, (_, one) in zip(prompts, answered, strict=True)]
    layers = [*recording.taps, recording.target.layers]
    readings = engine.read(texts, layers, recording.top, beside)
    for (request, _), prompt, text, reading in zip(answered, prompts, texts, readings, strict=True):
        tokens_R = torch.tensor(text)
        states_RTH = torch.stack([reading.states[layer] for layer in layers], 1)
        answer_R = torch.arange(len(text)) >= len(prompt)
        recorded = RecordedText(tokens_R, answer_R, states_RTH, reading.top_ids_RN, reading.top_log_probs_RN)
        recording.keep(request.index, prompt_named(request), recorded)
    return Recorded(len(texts), sum(map(len, texts)), sum(len(one.tokens) for _, one in answered))
