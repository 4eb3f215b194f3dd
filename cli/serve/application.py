"""The routes. Every mistake of a client becomes an error here, in the shape that the path's protocol has for it."""

from __future__ import annotations

import logging
import time
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cli.engine.revision import fingerprint
from cli.messages_api.read import counted, messages
from cli.ollama_api import read as ollama
from cli.ollama_api.schema import OllamaChat, OllamaGenerate
from cli.openai.errors import ApiError, api_error, bad_request
from cli.openai.infill import infill
from cli.openai.logprobs import Json
from cli.openai.parse import HttpRequest, read_chat, unknown_model, validated
from cli.openai.prepare import encode, prompt_of
from cli.openai.schema import TokenizeRequest
from cli.openai.stream import chat, completion
from cli.responses_api.read import ResponsesReader
from cli.responses_api.store import ResponseStore
from cli.serve.bodies import read_json
from cli.serve.completions import Completions, Endpoint, ServerSettings, ready
from cli.serve.embedding import Embeddings
from cli.serve.framing import LINES
from cli.serve.guard import Guard, Policy
from cli.serve.metrics import exposition, together
from cli.serve.models import Models
from cli.serve.openapi import document
from cli.serve.other_clients import OtherClients
from cli.serve.refusals import response_of
from specexec.text.template_options import Wishes

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

log = logging.getLogger(__name__)

# The page has its script and style inside and talks to this server only.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def application(models: Models, settings: ServerSettings, policy: Policy) -> ASGIApp:
    """The whole server as one ASGI app; the models are started and closed by the caller."""
    store = ResponseStore()
    completions, responses = Completions(models, settings), ResponsesReader(store)
    embedding = Embeddings(models, settings)
    status, others = _ModelAndState(models, settings), OtherClients(models, settings, store)
    talk = completions.endpoint(ollama.chat, LINES, partial(others.kept, OllamaChat))
    write = completions.endpoint(ollama.generate, LINES, partial(others.kept, OllamaGenerate))
    routes = [
        Route("/", status.page),
        Route("/openapi.json", _kind(status.openapi)),
        Route("/health", _kind(status.health)),
        Route("/metrics", _kind(status.metrics)),
        Route("/v1/models", _kind(status.models)),
        Route("/v1/models/{name:path}", _kind(status.model)),
        Route("/v1/chat/completions", _kind(completions.endpoint(chat)), methods=["POST"]),
        Route("/v1/completions", _kind(completions.endpoint(completion)), methods=["POST"]),
        Route("/v1/responses", _kind(completions.endpoint(responses.response)), methods=["POST"]),
        Route("/v1/responses/input_tokens", _kind(completions.counter(responses.prompt, _counted)), methods=["POST"]),
        Route("/v1/responses/{name}", _kind(others.stored), methods=["GET", "DELETE"]),
        Route("/api/chat", _kind(talk), methods=["POST"]),
        Route("/api/generate", _kind(write), methods=["POST"]),
        Route("/v1/embeddings", _kind(embedding.openai), methods=["POST"]),
        Route("/api/embed", _kind(embedding.ollama), methods=["POST"]),
        Route("/api/tags", _kind(others.tags)),
        Route("/api/ps", _kind(others.loaded)),
        Route("/api/show", _kind(others.show), methods=["POST"]),
        Route("/api/version", _kind(others.version)),
        Route("/infill", _kind(completions.endpoint(infill)), methods=["POST"]),
        Route("/props", _kind(others.props)),
        Route("/slots", _kind(others.slots)),
        Route("/apply-template", _kind(others.apply_template), methods=["POST"]),
        Route("/v1/messages", _kind(completions.endpoint(messages)), methods=["POST"]),
        Route("/v1/messages/count_tokens", _kind(completions.counter(counted, _input_tokens)), methods=["POST"]),
        *(
            route
            for prefix in ("", "/v1")
            for route in (
                Route(f"{prefix}/tokenize", _kind(status.tokenize), methods=["POST"]),
                Route(f"{prefix}/detokenize", _kind(status.detokenize), methods=["POST"]),
                Route(f"{prefix}/tokenizer_info", _kind(status.tokenizer_info)),
            )
        ),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={HTTPException: _unknown}), policy)


class _ModelAndState:
    """Everything but completions."""

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self._models = models
        self._settings = settings
        self._created = int(time.time())
        self._revisions: WeakKeyDictionary[Engine, str] = WeakKeyDictionary()

    async def page(self, _: Request) -> Response:
        html = files("cli.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document(self._settings.models))

    async def health(self, _: Request) -> Response:
        models, worker = self._models, self._models.first.worker
        status = "ok" if worker is None else worker.state  # a model that was unloaded comes back when it is asked for
        state: dict[str, object] = {"status": status, "model": self._settings.model}
        if worker is not None and status == "loading":
            state["loading_s"] = round(time.monotonic() - worker.started_s, 1)
            state |= {"layers_read": worker.layers_read, "layers_to_read": worker.layers_to_read}
        else:
            state |= {"running": models.running, "waiting": models.waiting}
        ok = status == "ok"
        return JSONResponse(state, 200 if ok else 503, headers={} if ok else {"Retry-After": "5"})

    async def metrics(self, _: Request) -> Response:
        models = self._models
        loaded = [worker.engine for one in models.hosted if (worker := one.loaded)]
        failed = sum(len(engine.drafter_failures) for engine in loaded)
        totals = together(one.totals for one in models.hosted)
        ready = models.first.state == "ok"
        text = exposition(totals, models.running, models.waiting, ready=ready, failed=failed)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._settings.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._settings.models:
            raise unknown_model(name, self._settings.models)
        return JSONResponse(self._card(name))

    async def tokenize(self, request: Request) -> Response:
        body = validated(TokenizeRequest, await read_json(request))
        given = [text for text in (body.content, body.prompt) if text is not None]
        if len(given) + (body.messages is not None) != 1:
            raise bad_request("give one of content, prompt or messages.", "content")
        special = _switch(body, "add_special_tokens", "add_special")
        control = _switch(body, "allow_control_tokens", "parse_special")
        async with self._models.using(body.model) as worker:
            ready(worker)
            if given:
                wishes = Wishes(control_tokens=control)
                read = partial(encode, worker.engine, given[0], wishes, special=special is not False)
            else:
                read = partial(prompt_of, worker.engine, _chat(body, control))
            tokens = worker.engine.encoding.in_vocabulary(await anyio.to_thread.run_sync(read))
            return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": worker.engine.context})

    async def detokenize(self, request: Request) -> Response:
        body = await read_json(request)
        tokens = body.get("tokens")
        async with self._models.using(_model(body)) as worker:
            ready(worker)
            vocabulary = len(worker.engine.tokenizer)
            given = tokens if isinstance(tokens, list) else [None]
            ids = [token for token in given if type(token) is int and 0 <= token < vocabulary]
            if len(ids) != len(given):
                raise bad_request(f"tokens must be a list of ids from 0 to {vocabulary - 1}.", "tokens")
            text = await anyio.to_thread.run_sync(worker.engine.decode, ids)
            return JSONResponse({"content": text, "prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        async with self._models.using(request.query_params.get("model")) as worker:
            ready(worker)
            tokenizer, encoding = worker.engine.tokenizer, worker.engine.encoding
            marks = tokenizer.special_tokens_map.items()
            special = {name: str(token) for name, token in marks if isinstance(token, str)}
            return JSONResponse(
                {
                    "tokenizer_class": type(tokenizer).__name__,
                    "vocab_size": len(tokenizer),
                    "model_max_length": worker.engine.context,
                    **special,
                    "eos_token_id": tokenizer.eos_token_id,
                    "chat_template": encoding.template,
                }
            )

    def _card(self, name: str) -> dict[str, object]:
        card: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "specexec",
        }
        hosted = self._models.named(name)
        worker = hosted.loaded
        card["status"] = {"value": "loaded" if worker else hosted.state}
        if worker:
            engine = worker.engine
            card["max_model_len"] = engine.context
            card["meta"] = {
                "context": engine.context,
                "drafter": engine.drafter_name,
                "drafter_failures": engine.drafter_failures,
                "placement": engine.placement,
                "budget": engine.budget,
                "dtype": engine.dtype,
                "compute": engine.compute,
                "kv_quant": engine.kv_quant,
                "lossy": list(engine.lossy),
                "revision": self._revision(engine),
                "toy": engine.toy,
                "running": worker.running,
                "waiting": worker.waiting,
            }
        return card

    def _revision(self, engine: Engine) -> str:
        if engine not in self._revisions:
            self._revisions[engine] = fingerprint(engine.folders["target"], engine.adapters["target"])
        return self._revisions[engine]


def _input_tokens(tokens: int) -> Json:
    return {"input_tokens": tokens}


def _counted(tokens: int) -> Json:
    return {"object": "response.input_tokens", "input_tokens": tokens}


def _model(body: dict[str, object]) -> str | None:
    """The model that a body names, if it names one. Raises ApiError."""
    name = body.get("model")
    if not isinstance(name, str | None):
        raise bad_request("model must be a name.", "model")
    return name


def _switch(body: TokenizeRequest, *names: str) -> bool | None:
    """A switch under one of its names; None where it is not given."""
    found = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if len(found) > 1:
        raise bad_request(f"{' and '.join(found)}: one of them.", names[0])
    return next(iter(found.values()), None)


def _chat(body: TokenizeRequest, control: bool | None) -> HttpRequest:
    """What decides about the prompt that messages become."""
    names = ("messages", "tools", "chat_template_kwargs", "reasoning_effort")
    return read_chat({name: getattr(body, name) for name in names} | {"allow_control_tokens": control}, [])


def _kind(endpoint: Endpoint) -> Endpoint:
    """The endpoint with every error turned into an answer; a bug is logged here and named there."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=499)  # the client has gone
        except Exception as error:
            refusal = api_error(error)
            if refusal.status == 500:
                log.exception("%s %r failed", request.method, request.url.path)
            return response_of(refusal, request.url.path)

    return answer


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    path = request.url.path
    refused = response_of(ApiError(error.status_code, code, f"{request.method} {path}: {error.detail}."), path)
    refused.headers.update(error.headers or {})
    return refused
