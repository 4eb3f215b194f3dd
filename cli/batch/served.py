"""A run whose texts a server writes: its requests and its answers, in the place of an engine and its tokenizer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Literal

from cli.batch.input.items import Item, ItemText
from cli.batch.output.answers import ItemAnswer
from cli.batch.refusals import BadRequest
from cli.connect.models import ServedModel
from cli.connect.protocol import CHAT, COMPLETION, WATCHED, BurstReader, Json, sampling_fields
from cli.connect.server import Events
from cli.openai.choice import Choice
from cli.openai.errors import bad_request
from cli.shared.errors import ServerRefusal
from cli.shared.options import EngineOptions
from specexec.engine.request_types import Failure, Partial, Request, Result
from specexec.pieces import Piece
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Completion, FinishReason, Progress

if TYPE_CHECKING:
    from specexec.text.formats.thinking import Level

_LOOK_S = 1.0  # between two looks at whether the run is to end


@dataclass(frozen=True)
class ServedRequest(Request):
    """A request with the body that asks a server for it."""

    path: str = ""
    body: Json = field(default_factory=dict)


class ServedWork:
    """What a run needs of an engine and of a tokenizer. What an earlier run has written of a text is written again."""

    def __init__(self, model: ServedModel, options: EngineOptions, thinking: Level | None) -> None:
        self.model = model
        self._thinking = thinking
        self._variables, self._control_tokens = dict(options.template_vars), options.allow_control_tokens
        self._texts: dict[int, _Text] = {}  # by the index of their requests, until they are part of an answer
        self._stopped = Event()
        self._bytes_read = 0

    def requests(self, item: Item, run: SamplingParams) -> list[Request]:
        """One for each text. Raises what is wrong with the item."""
        return [self._request(item, text) for text in item.texts(run)]

    def answer(self, item: Item, run: SamplingParams, completions: Mapping[int, Completion]) -> ItemAnswer:
        """The texts of an item, as the server read them."""
        texts = [self._texts.pop(one.index) for one in completions.values()]
        choices = tuple(text.choice(at) for at, text in zip(completions, texts, strict=True))
        notes = dict.fromkeys(text.notes for text in texts if text.notes)
        return ItemAnswer(tuple(completions.values()), choices, tuple(notes))

    def batch(self, requests: Iterator[Request], parallel: int | Literal["auto"]) -> ServedBatch:
        """Ask for the texts, as many at a time as the server writes side by side."""
        places = self.model.server.asked(f"/props?model={self.model.name}")["total_slots"]
        return ServedBatch(self, requests, int(str(places)) if parallel == "auto" else parallel)

    def progress(self) -> Progress:
        return Progress(0, 0, 0, self._bytes_read)

    def stop(self) -> None:
        """End the run; what is not whole is written again by the next one. Safe in a signal handler."""
        self._stopped.set()
        for text in [*self._texts.values()]:
            text.events.stop()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def write(self, request: ServedRequest) -> Result:
        """One text, however long the server's line is. Raises NoServer when the server has gone."""
        while True:
            text = _Text(self.model.server.events(request.path, request.body), request.sampling.seed or 0)
            self._texts[request.index] = text
            try:
                return self._read(request, text)
            except ServerRefusal as refusal:
                if refusal.retry_s is None:
                    return Failure(request.index, refusal)
                if self._stopped.wait(refusal.retry_s):
                    return text.completion(request.index)

    def _read(self, request: ServedRequest, text: _Text) -> Completion:
        if not self.stopped:
            for burst in text.read():
                self._bytes_read += burst.bytes_read
        return text.completion(request.index)

    def _request(self, item: Item, text: ItemText) -> ServedRequest:
        if text.sampling.logprobs is not None:
            what = "log-probabilities are not read from a server; ask it for them at /v1/chat/completions."
            raise BadRequest(item.id, bad_request(what, "logprobs", "unsupported_parameter"))
        body: Json = {"model": self.model.name, **self._bounds(item), **sampling_fields(text.sampling), **WATCHED}
        if self._control_tokens:
            body["allow_control_tokens"] = True
        if item.chat:
            return ServedRequest(0, text.prompt, text.sampling, path=CHAT, body={**self._talk(item, text), **body})
        echo = item.asked is not None and item.asked.echo
        return ServedRequest(
            0, text.prompt, text.sampling, path=COMPLETION, body={**body, "prompt": text.prompt, "echo": echo}
        )

    def _talk(self, item: Item, text: ItemText) -> Json:
        """What a chat's body holds beside sampling."""
        body: Json = {"messages": text.prompt}
        asked, wishes = item.asked, item.template
        variables = {**self._variables, **(wishes.variables if wishes else {})}
        if variables:
            body["chat_template_kwargs"] = variables
        if thinking := (asked.thinking if asked else None) or self._thinking:
            body["reasoning_effort"] = thinking
        if wishes and wishes.ends_in != "answer":
            body |= {"add_generation_prompt": False, "continue_final_message": wishes.ends_in == "message"}
        if wishes and wishes.control_tokens is not None:
            body["allow_control_tokens"] = wishes.control_tokens
        return body

    @staticmethod
    def _bounds(item: Item) -> Json:
        """What an answer must look like."""
        body: Json = {}
        shape, tools = (item.asked.shape, item.asked.tools) if item.asked else (None, None)
        if shape and shape.schema is not None:
            body["json_schema"] = shape.schema
        elif shape and shape.grammar is not None:
            body["guided_grammar"] = shape.grammar
        elif shape:
            body["guided_regex"] = shape.regex
        if tools:
            free = tools.choice in ("auto", "required")
            named = {"type": "function", "function": {"name": tools.choice}}
            body |= {"tools": tools.offered, "parallel_tool_calls": tools.parallel}
            body["tool_choice"] = tools.choice if free else named
        elif item.asked and item.asked.calls_forbidden:
            body["tool_choice"] = "none"
        return body


class ServedBatch:
    """The same promises as an engine's batch (specexec/engine/batch.py); a `sweep` waits for the next whole text."""

    def __init__(self, work: ServedWork, requests: Iterator[Request], parallel: int) -> None:
        self.done = False
        self.sweeps = 0
        self._work, self._requests, self._parallel = work, requests, parallel
        self._pool = ThreadPoolExecutor(parallel, "answers")
        self._running: set[Future[Result]] = set()

    @property
    def partial(self) -> list[Partial]:
        """Nothing that another run could go on with."""
        return []

    def sweep(self) -> list[Result]:
        """Ask for as much as may run, and wait for the next answers. Raises NoServer when the server has gone."""
        while len(self._running) < self._parallel and (request := next(self._requests, None)) is not None:
            assert isinstance(request, ServedRequest)
            self._running.add(self._pool.submit(self._work.write, request))
        finished, self._running = wait(self._running, _LOOK_S, FIRST_COMPLETED)
        self.done = self._work.stopped or not (finished or self._running)
        failed = {one for one in finished if one.exception() is not None}
        if failed and failed != finished:  # what was answered is taken first
            self._running |= failed
            finished -= failed
        results = [one.result() for one in finished]
        self.sweeps += sum(one.sweeps for one in results if isinstance(one, Completion))
        return results

    def close(self) -> None:
        """Hang up wherever something is still written."""
        self._work.stop()
        self._pool.shutdown()


@dataclass
class _Text:
    """One text as it comes."""

    events: Events
    seed: int
    piece: Piece = field(default_factory=Piece)
    tokens: list[int] = field(default_factory=list)
    sweeps: int = 0
    drafted: int = 0
    accepted: int = 0
    bytes_read: int = 0
    last: Burst | None = None
    reader: BurstReader = field(default_factory=BurstReader)
    began_s: float = field(default_factory=time.monotonic)

    def read(self) -> Iterator[Burst]:
        """The sweeps that wrote at it, each counted."""
        for event in self.events:
            if (burst := self.reader.add(event)) is None:
                continue
            self.piece += burst.piece
            self.tokens += burst.tokens
            self.sweeps += bool(burst.tokens)
            self.drafted += burst.nodes
            self.accepted += burst.accepted
            self.bytes_read += burst.bytes_read
            self.seed, self.last = burst.seed, burst
            yield burst

    @property
    def notes(self) -> str:
        return self.events.notes

    @property
    def ended(self) -> FinishReason:
        return (self.last and self.last.finish_reason) or "interrupted"

    def completion(self, index: int) -> Completion:
        """What there is of it."""
        return Completion(
            index, self.piece.content, tuple(self.tokens), self.ended, self.reader.prompt_tokens, self.seed,
            self.sweeps, self.drafted, self.accepted, self.bytes_read, time.monotonic() - self.began_s,
            limit=self.last.limit if self.last else None,
        )  # fmt: skip

    def choice(self, index: int) -> Choice:
        """The same as a choice of a request."""
        called = self.ended == "stop" and self.piece.calls
        choice = Choice(index, self.reader.echo)
        choice.piece, choice.tokens, choice.seed = self.piece, len(self.tokens), self.seed
        choice.finish_reason = "tool_calls" if called else self.ended
        choice.limit = self.last.limit if self.last else None
        choice.drafted, choice.accepted, choice.sweeps = self.drafted, self.accepted, self.sweeps
        return choice
