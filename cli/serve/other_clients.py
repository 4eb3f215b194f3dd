"""What clients of llama.cpp's server and of Ollama ask about the model, and the stored responses of OpenAI's."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cli.ollama_api.read import served_name
from cli.ollama_api.schema import OllamaRequest
from cli.openai.errors import bad_request
from cli.openai.parse import read_chat, unknown_model, validated
from cli.openai.prepare import rendered
from cli.responses_api.store import ResponseStore
from cli.serve.bodies import read_json
from cli.serve.completions import ServerSettings, ready
from cli.serve.models import Models
from specexec.text.formats import format_of


class OtherClients:
    """Endpoints that write no text."""

    def __init__(self, models: Models, settings: ServerSettings, store: ResponseStore) -> None:
        self._models, self._settings, self._store = models, settings, store
        self._since = datetime.fromtimestamp(time.time(), UTC).isoformat()
        self._unloading = CapacityLimiter(1)

    async def stored(self, request: Request) -> Response:
        """GET and DELETE of /v1/responses/NAME."""
        name = request.path_params["name"]
        if request.method == "DELETE":
            self._store.delete(name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        return JSONResponse(self._store.get(name).body)

    async def props(self, request: Request) -> Response:
        """llama.cpp's /props."""
        name = request.query_params.get("model")
        async with self._models.using(name) as worker:
            ready(worker)
            engine = worker.engine
            return JSONResponse(
                {
                    "default_generation_settings": {"n_ctx": engine.context},
                    "total_slots": worker.parallel,
                    "model_alias": self._models.named(name).names[0],
                    "chat_template": engine.encoding.template,
                    "modalities": {"vision": engine.encoding.images is not None, "audio": False},
                    "build_info": f"specexec-{version('specexec')}",
                }
            )

    async def slots(self, request: Request) -> Response:
        """llama.cpp's /slots: a place for each text of a sweep, and whether one is written there."""
        async with self._models.using(request.query_params.get("model")) as worker:
            ready(worker)
            context, writing = worker.engine.context, worker.running
            places = range(worker.parallel)
            return JSONResponse([{"id": at, "n_ctx": context, "is_processing": at < writing} for at in places])

    async def apply_template(self, request: Request) -> Response:
        """llama.cpp's /apply-template: the prompt that a chat request would have, as text."""
        body = await read_json(request)
        async with self._models.using(body.get("model")) as worker:
            ready(worker)
            asked = await to_thread.run_sync(read_chat, body, self._settings.models)
            return JSONResponse({"prompt": await to_thread.run_sync(rendered, worker.engine, asked)})

    async def tags(self, _: Request) -> Response:
        """Ollama's list of models."""
        return JSONResponse({"models": [self._listed(name) for name in self._settings.models]})

    async def loaded(self, _: Request) -> Response:
        """Ollama's list of the models that are loaded."""
        loaded = [
            {**self._listed(one.names[0]), "context_length": worker.engine.context}
            for one in self._models.hosted
            if (worker := one.loaded)
        ]
        return JSONResponse({"models": loaded})

    async def kept(self, kind: type[OllamaRequest], body: dict[str, object]) -> Response | None:
        """Ollama's way to load a model or, with `keep_alive` 0, to unload it: a request without a prompt."""
        if not body.get("model") or body.get("prompt") or body.get("messages") or body.get("images"):
            return None
        validated(kind, body)
        name = self._known(body)
        leaves = body.get("keep_alive") in (0, "0", "0s")
        if leaves:  # in a thread of its own: what it waits for needs the others
            await to_thread.run_sync(self._models.unload, self._models.named(name), limiter=self._unloading)
        else:
            async with self._models.using(name) as worker:
                ready(worker)
        now = datetime.now(UTC).isoformat()
        message: dict[str, object] = {"message": {"role": "assistant", "content": ""}} if "messages" in body else {}
        stated = {"model": name, "created_at": now, "response": "", **message, "done": True}
        return JSONResponse({**stated, "done_reason": "unload" if leaves else "load"})

    async def show(self, request: Request) -> Response:
        """Ollama's card of one model."""
        name = self._known(await read_json(request))
        async with self._models.using(name) as worker:
            ready(worker)
            engine = worker.engine
            form = await to_thread.run_sync(partial(format_of, engine.encoding))
            sees = engine.encoding.images is not None
            able = {"completion": True, "vision": sees, "tools": form.calls, "thinking": form.thoughts}
            kind = engine.architecture
            return JSONResponse(
                {
                    "modified_at": self._since,
                    "template": engine.encoding.template or "",
                    "details": self._details(name),
                    "model_info": {"general.architecture": kind, f"{kind}.context_length": engine.context},
                    "capabilities": [name for name, can in able.items() if can],
                }
            )

    async def version(self, _: Request) -> Response:
        """Ollama's /api/version, with the version of specexec."""
        return JSONResponse({"version": version("specexec")})

    def _known(self, body: dict[str, object]) -> str:
        """The model that a body names. Raises ApiError."""
        given = [body[key] for key in ("model", "name") if body.get(key) is not None]
        names = [one for one in given if isinstance(one, str)]
        if not names or names != given:
            raise bad_request("model: a name is needed.", "model")
        for name in names:
            if served_name(name, self._settings.models) not in self._settings.models:
                raise unknown_model(name, self._settings.models)
        return names[0]

    def _listed(self, name: str) -> dict[str, object]:
        return {"name": name, "model": name, "modified_at": self._since, "details": self._details(name)}

    def _details(self, name: str) -> dict[str, object]:
        worker = self._models.named(name).loaded
        kind = worker.engine.architecture if worker else ""
        return {"family": kind, "families": [kind] if kind else []}
