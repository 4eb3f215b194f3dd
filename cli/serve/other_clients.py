"""What clients of llama.cpp's server and of Ollama ask about the model, and the stored responses of OpenAI's."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cli.ollama_api.read import served_name
from cli.openai.errors import bad_request
from cli.openai.parse import read_chat, unknown_model
from cli.openai.prepare import rendered
from cli.responses_api.store import ResponseStore
from cli.serve.bodies import read_json
from cli.serve.completions import ServerSettings, ready
from cli.serve.worker import Worker
from specexec.text.formats import format_of


class OtherClients:
    """Endpoints that write no text."""

    def __init__(self, worker: Worker, settings: ServerSettings, store: ResponseStore) -> None:
        self._worker, self._settings, self._store = worker, settings, store
        self._since = datetime.fromtimestamp(time.time(), UTC).isoformat()

    async def stored(self, request: Request) -> Response:
        """GET and DELETE of /v1/responses/NAME."""
        name = request.path_params["name"]
        if request.method == "DELETE":
            self._store.delete(name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        return JSONResponse(self._store.get(name).body)

    async def props(self, _: Request) -> Response:
        """llama.cpp's /props."""
        ready(self._worker)
        engine = self._worker.engine
        return JSONResponse(
            {
                "default_generation_settings": {"n_ctx": engine.context},
                "total_slots": self._worker.parallel,
                "model_alias": self._settings.model,
                "chat_template": engine.encoding.template,
                "modalities": {"vision": False, "audio": False},
                "build_info": f"specexec-{version('specexec')}",
            }
        )

    async def apply_template(self, request: Request) -> Response:
        """llama.cpp's /apply-template: the prompt that a chat request would have, as text."""
        ready(self._worker)
        asked = await to_thread.run_sync(read_chat, await read_json(request), self._settings.models)
        return JSONResponse({"prompt": await to_thread.run_sync(rendered, self._worker.engine, asked)})

    async def tags(self, _: Request) -> Response:
        """Ollama's list of models."""
        models = [
            {"name": name, "model": name, "modified_at": self._since, "details": self._details()}
            for name in self._settings.models
        ]
        return JSONResponse({"models": models})

    async def show(self, request: Request) -> Response:
        """Ollama's card of one model."""
        ready(self._worker)
        body, engine = await read_json(request), self._worker.engine
        name = body.get("model", body.get("name"))
        if not isinstance(name, str):
            raise bad_request("model: a name is needed.", "model")
        if served_name(name, self._settings.models) not in self._settings.models:
            raise unknown_model(name, self._settings.models)
        form = await to_thread.run_sync(partial(format_of, engine.encoding))
        able = {"completion": True, "tools": form.calls, "thinking": form.thoughts}
        kind = engine.architecture
        return JSONResponse(
            {
                "modified_at": self._since,
                "template": engine.encoding.template or "",
                "details": self._details(),
                "model_info": {"general.architecture": kind, f"{kind}.context_length": engine.context},
                "capabilities": [name for name, can in able.items() if can],
            }
        )

    async def version(self, _: Request) -> Response:
        """Ollama's /api/version, with the version of specexec."""
        return JSONResponse({"version": version("specexec")})

    def _details(self) -> dict[str, object]:
        kind = self._worker.engine.architecture if self._worker.state == "ok" else ""
        return {"family": kind, "families": [kind] if kind else []}
