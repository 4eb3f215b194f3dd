"""A body of Ollama's API becomes a chat request. What is left out is said, what cannot be honoured is refused."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial

from cli.ollama_api.reply import OllamaReply
from cli.ollama_api.schema import OllamaChat, OllamaEmbed, OllamaGenerate, OllamaMessage, OllamaRequest, Options
from cli.openai.embeddings import EmbeddingTexts, check_served, check_texts
from cli.openai.errors import bad_request
from cli.openai.parse import Message, read_chat, read_completion, read_translated, validated
from cli.openai.reply import Exchange
from cli.openai.schema import FILL
from specexec.text.pictures import picture_part

_LATEST = ":latest"
# About the machine and about how long the model stays: decided when the server starts, and no text depends on it.
_HARMLESS = {
    "keep_alive",
    "num_thread",
    "num_gpu",
    "num_batch",
    "main_gpu",
    "low_vram",
    "use_mmap",
    "use_mlock",
    "numa",
}
_NAMES = {"max_tokens": "options.num_predict", "response_format": "format", "reasoning_effort": "think"} | {
    name: f"options.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop")
}


@dataclass(frozen=True)
class _Call:
    """A call in the history, with an id that Ollama's clients need not give."""

    id: str
    name: str
    message: Message


def chat(body: object, served: Items[str]) -> Exchange:
    """A turn of a conversation. Raises ApiError."""
    request = validated(OllamaChat, body)
    if not request.messages:
        raise bad_request("messages: at least one is needed.", "messages")
    return _exchange(request, served, {"messages": _messages(request.messages), "tools": request.tools}, "chat")


def read_embed(body: object, served: Items[str]) -> EmbeddingTexts:
    """Texts that are to become vectors, the mean of their tokens. Raises ApiError."""
    request = validated(OllamaEmbed, body)
    model = served_name(request.model, served)
    check_served(model, served)
    texts = (request.input,) if isinstance(request.input, str) else tuple(request.input)
    if texts:
        check_texts(texts)
    return EmbeddingTexts(
        request.model or served[0], texts, "mean", request.dimensions, cut=request.truncate is not False
    )


def generate(body: object, served: Items[str]) -> Exchange:
    """An answer to one prompt, with `raw` the continuation of a text. Raises ApiError."""
    request = validated(OllamaGenerate, body)
    for name in ("template", "context"):
        if getattr(request, name):
            raise bad_request(f"{name} is not supported.", name, "unsupported_parameter")
    if request.raw and request.images:
        raise bad_request("images are for prompts that the template writes, not for raw ones.", "images")
    if request.suffix and (request.images or request.system):
        raise bad_request("suffix: between two texts there is no place for images or a system prompt.", "suffix")
    if request.suffix:
        return _exchange(request, served, {"prompt": request.prompt or "", "suffix": request.suffix}, "generate")
    if request.raw:
        return _exchange(request, served, {"prompt": request.prompt or ""}, "generate")
    system: list[Message] = [{"role": "system", "content": request.system}] if request.system else []
    messages = [*system, {"role": "user", "content": _seen(request.prompt or "", request.images)}]
    return _exchange(request, served, {"messages": messages}, "generate")


def _seen(text: str, images: list[str] | None) -> object:
    """A message's content; its images, in base64, go before the text."""
    if not images:
        return text
    parts = [picture_part(f"data:image/png;base64,{image}") for image in images]
    return [*parts, {"type": "text", "text": text}]


def served_name(name: str | None, served: Items[str]) -> str | None:
    """A model's name without the tag that clients add to it."""
    known = name is None or name in served
    return name if known or name is None else name.removesuffix(_LATEST)


def _exchange(request: OllamaRequest, served: Items[str], prompt: dict[str, object], kind: str) -> Exchange:
    options = request.options or Options()
    fields = {f"options.{name}" for name in set(options.model_extra or {}) - _HARMLESS}
    fields |= set(request.model_extra or {}) - _HARMLESS
    raw = "prompt" in prompt
    body = {
        **prompt,
        "model": served_name(request.model, served),
        "stream": request.stream is not False,
        "max_tokens": FILL if options.num_predict is None or options.num_predict < 0 else options.num_predict,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "stop": options.stop,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "response_format": _format(request.format),
        **(_of_completion(request) if raw else _of_chat(request)),
    }
    notes = [f"ignored {name!r}" for name in sorted(fields)]
    asked = read_translated(read_completion if raw else read_chat, body, served, _NAMES, notes)
    return Exchange(replace(asked, cut_by_context=True), partial(OllamaReply, kind == "chat"))


def _of_chat(request: OllamaRequest) -> dict[str, object]:
    think = request.think
    effort = think if isinstance(think, str) else {True: "on", False: "none", None: None}[think]
    return {"reasoning_effort": effort, "logprobs": request.logprobs, "top_logprobs": request.top_logprobs}


def _of_completion(request: OllamaRequest) -> dict[str, object]:
    return {"logprobs": (request.top_logprobs or 0) if request.logprobs else None}


def _format(given: dict[str, object] | str | None) -> object:
    if isinstance(given, dict):
        return {"type": "json_schema", "json_schema": {"schema": given}}
    if given not in (None, "", "json"):
        raise bad_request(f"format: 'json' or a JSON schema, not {given!r}.", "format")
    return {"type": "json_object"} if given else None


def _messages(given: list[OllamaMessage]) -> list[Message]:
    messages: list[Message] = []
    waiting: list[_Call] = []  # for their results
    for index, one in enumerate(given):
        message: Message = {"role": one.role, "content": _seen(one.content or "", one.images)}
        if one.thinking:
            message["reasoning_content"] = one.thinking
        if one.tool_calls:
            at = f"messages.{index}.tool_calls"
            calls = [_call(call, f"{at}.{place}", f"call_{index}_{place}") for place, call in enumerate(one.tool_calls)]
            message["tool_calls"] = [call.message for call in calls]
            waiting += calls
        if one.role == "tool":
            message |= _result(one, waiting)
        messages.append(message)
    return messages


def _call(call: dict[str, object], at: str, new_id: str) -> _Call:
    function, given = call.get("function"), call.get("id")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise bad_request(f"{at}: a call needs a function with a name.", at)
    own_id = given if isinstance(given, str) and given else new_id
    return _Call(own_id, name, {"id": own_id, "type": "function", "function": function})


def _result(one: OllamaMessage, waiting: list[_Call]) -> Message:
    """Which call a result belongs to: that of its id, or the first of its tool that has no result yet."""
    own_id = one.tool_call_id
    fitting = (call for call in waiting if (own_id or call.id) == call.id)
    call = next((call for call in fitting if own_id or one.tool_name in (None, call.name)), None)
    if call is not None:
        waiting.remove(call)
    known: Message = {} if one.tool_name is None else {"name": one.tool_name}
    found = own_id or (call and call.id)
    return {**known, "tool_call_id": found} if found else known
