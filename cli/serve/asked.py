"""What a request body says: checked, and turned into the engine's own words. Nothing is ignored in silence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cli.serve.failures import ApiError, bad_request
from specexec.errors import BadSampling
from specexec.sampling import SamplingParams, derived_seed

MOST_CHOICES = 16
MOST_STOPS = 16
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions; a chat may fill the context

R = TypeVar("R", bound="Request")
Prompt: TypeAlias = str | list[int] | list[dict[str, str]]

# What each parameter may say without asking for something that we do not have.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "guided_json": (None,),
    "guided_regex": (None,),
    "grammar": (None, ""),
}
# Accepted because clients send them as a matter of course; none of them changes a text.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
}


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class Part(BaseModel):
    """One piece of a message's content."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """One turn. Tools and pictures are refused by name, not dropped."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class Request(BaseModel):
    """What chat and plain completion share."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    watch: bool = False


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(Request):
    """The body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False


@dataclass(frozen=True)
class Asked:
    """A request in our own words. `max_tokens` None fills the context; `watch` adds trees and sweeps to the stream."""

    chat: bool
    prompts: list[Prompt]
    sampling: SamplingParams
    max_tokens: int | None
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    watch: bool
    ignored: tuple[str, ...]

    def sampling_of(self, choice: int, max_tokens: int, fresh_seed: int) -> SamplingParams:
        """The first choice has the seed that was asked for; every other one a seed derived from it."""
        seed = fresh_seed if self.sampling.seed is None else self.sampling.seed
        own = seed if choice == 0 else derived_seed(seed, "choice", choice)
        return replace(self.sampling, seed=own, max_tokens=max_tokens)


def read_chat(body: object, served: list[str]) -> Asked:
    """A chat completion. Raises ApiError."""
    request = _checked(ChatRequest, body, served)
    messages = [_message(message, index) for index, message in enumerate(request.messages)]
    return _asked(request, [messages], request.max_completion_tokens or request.max_tokens, chat=True)


def read_completion(body: object, served: list[str]) -> Asked:
    """A completion of raw text or token ids, one prompt or several. Raises ApiError."""
    request = _checked(CompletionRequest, body, served)
    prompts = _prompts(request.prompt)
    return _asked(request, prompts, request.max_tokens or DEFAULT_COMPLETION_TOKENS, chat=False, echo=request.echo)


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids or not prompt:
        return [ids]
    return [item for item in prompt if not isinstance(item, int)]


def _checked(kind: type[R], body: object, served: list[str]) -> R:
    try:
        request = kind.model_validate(body)
    except ValidationError as problems:
        first = problems.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(step) for step in first["loc"]) or None
        raise bad_request(f"{at or 'the body'}: {first['msg'][0].lower()}{first['msg'][1:]}.", at) from None
    for name, harmless in _UNSUPPORTED.items():
        value = (request.model_extra or {}).get(name)
        if not any(value == allowed and type(value) is type(allowed) for allowed in harmless):
            raise bad_request(f"{name} is not supported by this server yet.", name, "unsupported_parameter")
    if request.model is not None and request.model not in served:
        known = ", ".join(served)
        raise ApiError(404, "model_not_found", f"no model {request.model!r} here; known: {known}.", param="model")
    return request


def _message(message: ChatMessage, index: int) -> dict[str, str]:
    at = f"messages.{index}"
    for name in ("tool_calls", "function_call", "tool_call_id"):
        if (message.model_extra or {}).get(name):
            raise bad_request(f"{name} is not supported by this server yet.", f"{at}.{name}", "unsupported_parameter")
    role = "system" if message.role == "developer" else message.role  # OpenAI's newer name for the same thing
    if not isinstance(message.content, list):
        return {"role": role, "content": message.content or ""}
    for part in message.content:
        if part.type != "text":
            raise bad_request(f"this model reads text, not {part.type!r}.", f"{at}.content", "unsupported_content")
    return {"role": role, "content": "".join(part.text for part in message.content)}


def _asked(request: Request, prompts: list[Prompt], max_tokens: int | None, *, chat: bool, echo: bool = False) -> Asked:
    n = request.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise bad_request(f"{len(prompts) * n} choices were asked for, one request may have {MOST_CHOICES}.", "n")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > MOST_STOPS:
        raise bad_request(f"{len(stop)} stop texts were given, {MOST_STOPS} are allowed.", "stop")
    extra = set(request.model_extra or {}) - set(_UNSUPPORTED) - _HARMLESS
    options = request.stream_options
    return Asked(
        chat=chat,
        prompts=prompts,
        sampling=_sampling(request, stop),
        max_tokens=max_tokens,
        n=n,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        echo=echo,
        watch=request.watch,
        ignored=tuple(sorted(extra)),
    )


def _sampling(request: Request, stop: tuple[str, ...]) -> SamplingParams:
    try:
        return SamplingParams(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            seed=request.seed,
            stop=stop,
            ignore_eos=bool(request.ignore_eos),
        )
    except BadSampling as problem:
        raise bad_request(problem.what, problem.what.split()[0]) from None
