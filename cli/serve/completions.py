"""From a request in any protocol to its answer, streamed or whole. Knows no protocol."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import anyio
from anyio import to_thread
from sse_starlette import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cli.openai.choice import Choice
from cli.openai.errors import ApiError
from cli.openai.logprobs import Json, LogprobReader
from cli.openai.parse import HttpRequest
from cli.openai.prepare import Prepared, prepare, prompt_of
from cli.openai.reply import Exchange, Prompted, ProtocolReply, Standing
from cli.serve.bodies import read_json
from cli.serve.framing import EVENTS, Framing
from cli.serve.models import Models
from cli.serve.refusals import notes_header
from cli.serve.worker import Ticket, Worker
from cli.serve.writing import Writing

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

WATCH_S = 0.2  # between two signs of life for those who watch the sweep
SLOWEST_READER_S = 300.0  # a client that takes nothing for so long has gone without saying so
FAREWELL_S = 5.0  # for the last event of a stream when the server stops

Read = Callable[[object, Items[str]], Exchange]
ReadPrompt = Callable[[object, Items[str]], HttpRequest]
Instead = Callable[[dict[str, object]], Awaitable[Response | None]]
Endpoint = Callable[[Request], Awaitable[Response]]
Keepalive = Literal["comment", "empty-delta"]


@dataclass(frozen=True)
class ServerSettings:
    """The server's settings: its models' names, seconds between signs of life, the log, and the time limit."""

    models: tuple[str, ...]
    keepalive_s: float
    keepalive: Keepalive
    log: Callable[[str], None]
    timeout_s: float | None = None

    @property
    def model(self) -> str:
        """The name for those who ask for none."""
        return self.models[0]


class Completions:
    """All endpoints that write text; they differ in how a body is read, and in the words of the reply."""

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self._models = models
        self._settings = settings

    def endpoint(self, read: Read, framing: Framing = EVENTS, instead: Instead | None = None) -> Endpoint:
        """An endpoint that answers in one protocol; what `instead` answers asks for no text."""

        async def answer(request: Request) -> Response:
            body = await read_json(request)
            if instead is not None and (given := await instead(body)) is not None:
                return given
            async with self._models.using(body.get("model")) as worker:
                ready(worker)
                exchange, prepared = await to_thread.run_sync(self._prepared, worker, read, body)
                return await self._answer(worker, request, framing, exchange, prepared)

        return answer

    def counter(self, read: ReadPrompt, body_of: Callable[[int], Json]) -> Endpoint:
        """An endpoint that says how many tokens the prompt of a request has."""

        async def answer(request: Request) -> Response:
            body = await read_json(request)
            async with self._models.using(body.get("model")) as worker:
                ready(worker)
                return JSONResponse(body_of(await to_thread.run_sync(self._counted, worker, read, body)))

        return answer

    async def _answer(
        self, worker: Worker, request: Request, framing: Framing, exchange: Exchange, prepared: Prepared
    ) -> Response:
        asked = exchange.asked
        writing = self._writing(worker, asked, prepared)
        prompt_tokens = sum(len(text.tokens) for text in prepared.texts)
        engine = worker.engine
        reply = exchange.reply(
            Prompted(
                asked.model or self._settings.model,
                prompt_tokens,
                engine.decode,
                lambda text: len(engine.encoding.encode_part(text)),
                engine.lossy,
            )
        )
        record = _Record(request, asked, prepared.notes, prompt_tokens, writing, self._settings.log)
        headers = notes_header(prepared.notes)
        writing.submit()
        if asked.stream:
            return EventSourceResponse(
                self._events(framing, writing, reply, record),
                media_type=framing.media_type,
                ping=min(WATCH_S, self._settings.keepalive_s) if asked.watch else self._settings.keepalive_s,
                ping_message_factory=partial(self._alive, engine, framing, writing, reply),  # type: ignore[arg-type]  # bytes
                send_timeout=SLOWEST_READER_S,
                shutdown_event=anyio.Event(),
                shutdown_grace_period=FAREWELL_S,
                headers=headers,
                background=BackgroundTask(record.close),  # also when the client left before the first event
            )
        return await _whole(request, writing, reply, record, headers)

    def _prepared(self, worker: Worker, read: Read, body: object) -> tuple[Exchange, Prepared]:
        exchange = read(body, self._settings.models)
        return exchange, prepare(worker.engine, exchange.asked)

    def _counted(self, worker: Worker, read: ReadPrompt, body: object) -> int:
        return len(prompt_of(worker.engine, read(body, self._settings.models)))

    def _writing(self, worker: Worker, asked: HttpRequest, prepared: Prepared) -> Writing:
        engine, writing = worker.engine, Writing(worker, self._settings.timeout_s)
        fresh_seed = secrets.randbits(32)
        for text in prepared.texts:
            left = engine.context - len(text.tokens)
            room = min(asked.max_tokens or left, left)
            for number in range(asked.n):
                sampling = asked.sampling_of(number, room, fresh_seed, text.grammar)
                wanted = asked.sampling.logprobs is not None
                logprob_reader = LogprobReader(engine.encoding.piece, text.tokens, asked.echo) if wanted else None
                choice = Choice(
                    len(writing.choices),
                    text.echo,
                    text.reader(engine.filled(sampling).stop or ()),
                    logprob_reader,
                    sampling.stop_token_ids,
                    first=number == 0,
                )
                writing.add(choice, partial(Ticket, text.tokens, text.images, sampling))
        return writing

    async def _events(
        self, framing: Framing, writing: Writing, reply: ProtocolReply, record: _Record
    ) -> AsyncIterator[bytes]:
        try:
            for event in reply.opening(writing.choices):
                yield framing.bytes_of(event)
            async for choice, news in writing.bursts():
                for event in reply.more(choice, news):
                    yield framing.bytes_of(event)
            for event in reply.closing(writing.choices):
                yield framing.bytes_of(event)
        except ApiError as error:
            record.error = error.code
            for event in reply.failing(error):
                yield framing.bytes_of(event)
        finally:
            record.close()

    def _alive(self, engine: Engine, framing: Framing, writing: Writing, reply: ProtocolReply) -> bytes:
        """What a silent sweep sends, so that no proxy on the way closes the stream as dead."""
        standing = Standing(writing.ahead, engine.progress())
        comments = self._settings.keepalive == "comment"
        return framing.bytes_of(reply.alive(standing, writing.unfinished, comments))


def ready(worker: Worker) -> None:
    """Raises ApiError unless there is a model to answer with."""
    if worker.state == "loading":
        waited_s = time.monotonic() - worker.started_s
        raise ApiError(503, "model_loading", f"the model is loading, since {waited_s:.0f} s.", retry_s=5)
    if worker.state == "failed":
        raise ApiError(
            503, "model_unavailable", "the model could not be loaded; the server's log says why.", retry_s=60
        )
    if worker.state != "ok":
        raise ApiError(503, "model_unavailable", "there is no model to answer with.", retry_s=60)


async def _whole(
    request: Request, writing: Writing, reply: ProtocolReply, record: _Record, headers: dict[str, str]
) -> Response:
    finishing = asyncio.ensure_future(writing.finish())
    leaving = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({finishing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not finishing.done():
            return Response(status_code=499)  # the client has gone
        finishing.result()
        return JSONResponse(reply.whole(writing.choices), headers=headers)
    except ApiError as error:
        record.error = error.code
        raise
    finally:
        finishing.cancel()
        leaving.cancel()
        record.close()


async def _departure(request: Request) -> None:
    """Until the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Record:
    """One line of the access log, written when a request ends, however it ends; closing it lets the engine go."""

    def __init__(
        self,
        request: Request,
        asked: HttpRequest,
        notes: tuple[str, ...],
        prompt_tokens: int,
        writing: Writing,
        log: Callable[[str], None],
    ) -> None:
        self.error: str | None = None
        self._what = f"{request.method} {request.url.path}{' stream' if asked.stream else ''}"
        self._notes = "".join(f" · {note}" for note in notes)
        self._prompt_tokens, self._writing, self._log = prompt_tokens, writing, log
        self._began_s = time.monotonic()
        self._open = True

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        left = self._writing.cancel()
        choices = self._writing.choices
        took = f"{self._prompt_tokens}+{sum(choice.tokens for choice in choices)} tok"
        ending = f" · {self.error}" if self.error else " · client left" if left else ""
        sweeps = max(choice.sweeps for choice in choices)
        seconds = time.monotonic() - self._began_s
        self._log(f"{self._what} {took} {seconds:.1f} s {sweeps} sweep{'s' * (sweeps != 1)}{ending}{self._notes}")
