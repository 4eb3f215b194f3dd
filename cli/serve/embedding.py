"""Texts become vectors: /v1/embeddings, and Ollama's /api/embed. All texts of a request share sweeps."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cli.ollama_api.read import read_embed
from cli.openai.embeddings import EmbeddingTexts, check_dimensions, embedded, read_embeddings
from cli.serve.bodies import read_json
from cli.serve.completions import ServerSettings, ready
from cli.serve.models import Models
from cli.serve.worker import Stopping, Task, Worker
from cli.serve.writing import STOPPING

if TYPE_CHECKING:
    from specexec.engine.engine import Engine


class Embeddings:
    """Endpoints that read, and write nothing."""

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self._models, self._settings = models, settings

    async def openai(self, request: Request) -> Response:
        """/v1/embeddings."""
        body = await read_json(request)
        async with self._models.using(body.get("model")) as worker:
            ready(worker)
            asked = read_embeddings(body, self._settings.models)
            vectors, tokens = await self._vectors(worker, asked, request)
            model = asked.model or self._settings.model
            return JSONResponse(await to_thread.run_sync(embedded, asked, model, vectors, tokens))

    async def ollama(self, request: Request) -> Response:
        """/api/embed."""
        body = await read_json(request)
        async with self._models.using(body.get("model")) as worker:
            ready(worker)
            asked, began_s = read_embed(body, self._settings.models), time.monotonic()
            vectors, tokens = await self._vectors(worker, asked, request) if asked.texts else ([], 0)
            took = {"total_duration": round(1e9 * (time.monotonic() - began_s)), "load_duration": 0}
            given = {"model": asked.model, "embeddings": vectors, **took, "prompt_eval_count": tokens}
            return JSONResponse(given)

    async def _vectors(self, worker: Worker, asked: EmbeddingTexts, request: Request) -> tuple[list[list[float]], int]:
        """A vector for each text, and how many tokens all of them have. Raises ApiError."""
        began_s, engine = time.monotonic(), worker.engine
        check_dimensions(asked.dimensions, engine.width)
        texts = await to_thread.run_sync(asked.tokens, engine)
        task = Task(partial(_read, texts, asked), max(map(len, texts)))
        try:
            worker.do(task)
            vectors = await asyncio.wrap_future(task.result)
        except Stopping:
            raise STOPPING from None
        assert isinstance(vectors, list)
        tokens = sum(map(len, texts))
        seconds = time.monotonic() - began_s
        self._settings.log(f"POST {request.url.path} {len(texts)} texts {tokens} tok {seconds:.1f} s")
        return vectors, tokens


def _read(texts: list[list[int]], asked: EmbeddingTexts, engine: Engine, held: list[int]) -> list[list[float]]:
    return [vector.tolist() for vector in engine.embeddings(texts, asked.pooling, held)]
