"""/openapi.json: what every path takes, by the schemas that read it, and what it answers where that has one shape."""

from __future__ import annotations

import re
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cli.messages_api.schema import CountRequest, MessagesRequest
from cli.ollama_api.schema import OllamaChat, OllamaEmbed, OllamaGenerate
from cli.openai.embeddings import EmbeddingRequest
from cli.openai.logprobs import Json
from cli.openai.schema import ChatRequest, CompletionRequest, TokenizeRequest
from cli.responses_api.schema import PromptRequest, ResponsesRequest

_SCHEMAS = "#/components/schemas/{model}"
_STRING: Json = {"type": "string"}
_TEXT: Json = {"type": ["string", "null"]}
_OBJECT: Json = {"type": "object"}


@dataclass(frozen=True)
class Operation:
    """One thing to ask for. `body` is what it takes, `streams` the type of its answer if that may be a stream."""

    method: Literal["get", "post", "delete"]
    path: str
    summary: str
    body: type[BaseModel] | Json | None = None
    streams: str | None = None
    media: str = "application/json"
    shape: Json = field(default_factory=lambda: _OBJECT)
    by_model: bool = False


def _fields(required: tuple[str, ...] = (), **known: Json) -> Json:
    """An object with these fields, and others that are not looked at."""
    return {"type": "object", "properties": {"model": {"type": ["string", "null"]}, **known}, "required": [*required]}


_EVENTS, _LINES = "text/event-stream", "application/x-ndjson"
_IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_INFILL = _fields(input_prefix=_TEXT, input_suffix=_TEXT, prompt=_TEXT)
_NAMED = _fields(name=_STRING)

OPERATIONS = (
    Operation("get", "/", "A page to chat on.", media="text/html", shape=_STRING),
    Operation("get", "/openapi.json", "This document."),
    Operation("get", "/health", "Whether the first model is loading, ok, failed or stopping."),
    Operation("get", "/metrics", "Counters for Prometheus.", media="text/plain", shape=_STRING),
    Operation("get", "/v1/models", "The models, loaded or not."),
    Operation("get", "/v1/models/{name}", "One of them."),
    Operation("post", "/v1/chat/completions", "OpenAI's chat completion.", ChatRequest, _EVENTS),
    Operation("post", "/v1/completions", "OpenAI's completion of raw text.", CompletionRequest, _EVENTS),
    Operation("post", "/v1/responses", "OpenAI's Responses.", ResponsesRequest, _EVENTS),
    Operation("post", "/v1/responses/input_tokens", "How many tokens its prompt has.", PromptRequest),
    Operation("get", "/v1/responses/{name}", "A response that was stored."),
    Operation("delete", "/v1/responses/{name}", "Forget it."),
    Operation("post", "/v1/embeddings", "Texts as vectors.", EmbeddingRequest),
    Operation("post", "/v1/messages", "Anthropic's Messages.", MessagesRequest, _EVENTS),
    Operation("post", "/v1/messages/count_tokens", "How many tokens its prompt has.", CountRequest),
    Operation("post", "/api/chat", "Ollama's chat.", OllamaChat, _LINES),
    Operation("post", "/api/generate", "Ollama's answer to one prompt.", OllamaGenerate, _LINES),
    Operation("post", "/api/embed", "Texts as vectors.", OllamaEmbed),
    Operation("get", "/api/tags", "The models, as Ollama lists them."),
    Operation("get", "/api/ps", "Those that are loaded."),
    Operation("post", "/api/show", "Ollama's card of one model.", _NAMED),
    Operation("get", "/api/version", "The version of specexec."),
    Operation("get", "/props", "llama.cpp's facts of a model.", by_model=True),
    Operation("get", "/slots", "The places of a sweep.", shape={"type": "array", "items": _OBJECT}, by_model=True),
    Operation("post", "/infill", "llama.cpp's text between two texts.", _INFILL, _EVENTS),
    Operation("post", "/apply-template", "The prompt of a chat as text.", ChatRequest),
    *(
        operation
        for prefix in ("", "/v1")
        for operation in (
            Operation("post", f"{prefix}/tokenize", "Text or messages as token ids.", TokenizeRequest),
            Operation("post", f"{prefix}/detokenize", "Token ids as text.", _fields(("tokens",), tokens=_IDS)),
            Operation("get", f"{prefix}/tokenizer_info", "What a remote tokenizer must know.", by_model=True),
        )
    ),
)


def document(served: Items[str]) -> Json:
    """OpenAPI 3.1; `served` are the names that a request may give for a model."""
    bodies = {one.body for one in OPERATIONS if isinstance(one.body, type)}
    _, given = models_json_schema([(body, "validation") for body in sorted(bodies, key=str)], ref_template=_SCHEMAS)
    schemas: dict[str, dict[str, Json]] = given["$defs"]
    for body in bodies:
        schemas[body.__name__]["properties"]["model"] = {"enum": [*served, None]}
    paths: dict[str, Json] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _described(one, served)
    keys: Json = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "specexec", "version": version("specexec")},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _described(one: Operation, served: Items[str]) -> Json:
    places = re.findall(r"{(\w+)}", one.path)
    names: list[Json] = [{"name": name, "in": "path", "required": True, "schema": _STRING} for name in places]
    if one.by_model:
        names.append({"name": "model", "in": "query", "schema": {"enum": [*served, ""]}})
    answers: Json = {one.media: {"schema": one.shape}, **({one.streams: {"schema": _STRING}} if one.streams else {})}
    refusal: Json = {"description": "A refusal, and why.", "content": {"application/json": {"schema": _refused(one)}}}
    described: Json = {
        "summary": one.summary,
        "parameters": names,
        "responses": {"200": {"description": "The answer.", "content": answers}, "4XX": refusal, "5XX": refusal},
    }
    if one.body is not None:
        if isinstance(one.body, type):
            schema: Json = {"$ref": _SCHEMAS.format(model=one.body.__name__)}
        else:
            schema = _with_names(one.body, served)
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described


def _with_names(body: Json, served: Items[str]) -> Json:
    known = body["properties"]
    assert isinstance(known, dict)
    names = {name: {"enum": [*served, None]} for name in ("model", "name") if name in known}
    return {**body, "properties": {**known, **names}}


def _refused(one: Operation) -> Json:
    """An error in the words of the path's protocol; /health says how it is."""
    if one.path == "/health":
        return _OBJECT
    ollama = one.path.startswith("/api/")
    return {"type": "object", "properties": {"error": _STRING if ollama else _OBJECT}, "required": ["error"]}
