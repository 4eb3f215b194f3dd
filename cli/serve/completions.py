"""/v1/chat/completions and /v1/completions: from a checked request to texts, streamed or whole."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Literal

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cli.openai.errors import ApiError
from cli.openai.logprobs import Json, LogprobReader
from cli.openai.parse import HttpRequest, read_chat, read_completion
from cli.openai.prepare import Prepared, prepare
from cli.openai.responses import NOTHING, ApiReply, Choice, picture, place
from cli.serve.bodies import read_json
from cli.serve.refusals import notes_header
from cli.serve.worker import Ticket, Worker
from cli.serve.writing import Writing

WATCH_S = 0.2
SLOWEST_READER_S = 300.0  # a client that takes nothing for so long has gone without saying so
FAREWELL_S = 5.0  # for the last event of a stream when the server stops

Read = Callable[[object, Items[str]], HttpRequest]
Keepalive = Literal["comment", "empty-delta"]


@dataclass(frozen=True)
class Manner:
    """How the server speaks: its model's names, the pace of signs of life, where its log lines go, and its patience."""

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
    """Both endpoints; they differ in how a request is read and in the shape of the reply."""

    def __init__(self, worker: Worker, manner: Manner) -> None:
        self._worker = worker
        self._manner = manner

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def _answer(self, request: Request, read: Read) -> Response:
        ready(self._worker)
        body = await read_json(request)
        asked, prepared = await anyio.to_thread.run_sync(self._prepared, read, body)
        writing = self._writing(asked, prepared)
        reply = ApiReply(
            asked.chat, asked.model or self._manner.model, sum(len(text.tokens) for text in prepared.texts)
        )
        record = _Record(request, asked, prepared.notes, reply, writing, self._manner.log)
        headers = notes_header(prepared.notes)
        writing.submit()
        if asked.stream:
            return EventSourceResponse(
                self._events(asked, writing, reply, record),
                sep="\n",
                ping=self._manner.keepalive_s,
                ping_message_factory=partial(self._sign_of_life, writing, reply),
                send_timeout=SLOWEST_READER_S,
                shutdown_event=anyio.Event(),
                shutdown_grace_period=FAREWELL_S,
                headers={"X-Accel-Buffering": "no", **headers},
                background=BackgroundTask(record.close),  # also when the client left before the first event
            )
        return await _whole(request, writing, reply, record, headers)

    def _prepared(self, read: Read, body: object) -> tuple[HttpRequest, Prepared]:
        asked = read(body, self._manner.models)
        return asked, prepare(self._worker.engine, asked)

    def _writing(self, asked: HttpRequest, prepared: Prepared) -> Writing:
        engine, writing = self._worker.engine, Writing(self._worker, self._manner.timeout_s)
        fresh_seed = secrets.randbits(32)
        for text in prepared.texts:
            room = asked.max_tokens or engine.context - len(text.tokens)
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
                )
                writing.add(choice, partial(Ticket, text.tokens, sampling))
        return writing

    async def _events(
        self, asked: HttpRequest, writing: Writing, reply: ApiReply, record: _Record
    ) -> AsyncIterator[ServerSentEvent]:
        try:
            for choice in writing.choices:
                yield _event(reply.opening(choice))
            async for news in writing.bursts(WATCH_S if asked.watch else None):
                if news is None:
                    now = place(self._worker.engine.progress())
                    yield _event(reply.watched(progress=now, ahead=writing.ahead))
                    continue
                choice, burst, new = news
                if asked.watch:
                    seen = picture(burst, self._worker.engine.decode)
                    yield _event(reply.watched(index=choice.index, burst=seen))
                if new:
                    yield _event(reply.more(choice, new))
                if burst.finish_reason:
                    yield _event(reply.ending(choice))
            if asked.include_usage:
                yield _event(reply.used(writing.choices))
            yield ServerSentEvent(data="[DONE]", sep="\n")
        except ApiError as error:
            record.error = error.code
            yield _event(error.body)
        finally:
            record.close()

    def _sign_of_life(self, writing: Writing, reply: ApiReply) -> ServerSentEvent:
        """What a silent sweep sends, so that no proxy on the way closes the stream as dead."""
        if self._manner.keepalive == "empty-delta" and writing.unfinished:
            return _event(reply.more(writing.unfinished[0], NOTHING))
        now = self._worker.engine.progress()
        ahead = writing.ahead
        return ServerSentEvent(
            comment=f"waiting, {ahead} in line" if ahead else f"sweep {now.sweeps}, layer {now.layer}/{now.layers}",
            sep="\n",
        )


def ready(worker: Worker) -> None:
    """Raises ApiError unless there is a model to answer with."""
    if worker.state == "loading":
        waited_s = time.monotonic() - worker.started_s
        raise ApiError(503, "model_loading", f"the model is loading, since {waited_s:.0f} s.", retry_s=5)
    if worker.state != "ok":
        raise ApiError(503, "model_unavailable", "there is no model to answer with.", retry_s=60)


async def _whole(
    request: Request, writing: Writing, reply: ApiReply, record: _Record, headers: dict[str, str]
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


def _event(body: Json) -> ServerSentEvent:
    return ServerSentEvent(data=json.dumps(body, ensure_ascii=False, separators=(",", ":")), sep="\n")


class _Record:
    """One line of the access log, written when a request ends, however it ends; closing it lets the engine go."""

    def __init__(
        self,
        request: Request,
        asked: HttpRequest,
        notes: tuple[str, ...],
        reply: ApiReply,
        writing: Writing,
        log: Callable[[str], None],
    ) -> None:
        self.error: str | None = None
        self._what = f"{request.method} {request.url.path}{' stream' if asked.stream else ''}"
        self._notes = "".join(f" · {note}" for note in notes)
        self._reply, self._writing, self._log = reply, writing, log
        self._began_s = time.monotonic()
        self._open = True

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        left = self._writing.cancel()
        choices = self._writing.choices
        took = f"{self._reply.prompt_tokens}+{sum(choice.tokens for choice in choices)} tok"
        ending = f" · {self.error}" if self.error else " · client left" if left else ""
        sweeps = max(choice.sweeps for choice in choices)
        seconds = time.monotonic() - self._began_s
        self._log(f"{self._what} {took} {seconds:.1f} s {sweeps} sweep{'s' * (sweeps != 1)}{ending}{self._notes}")
