"""What a request body says: checked, and turned into the engine's own types. Nothing is ignored silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from cli.openai.errors import ApiError, bad_request
from cli.openai.schema import (
    FILL,
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
    RequestBody,
)
from cli.openai.shape import AnswerShape, read_shape
from cli.openai.tools import Tools, read_tools
from specexec.errors import BadSampling
from specexec.sampling.params import SamplingParams, derived_seed
from specexec.text.formats.thinking import Level
from specexec.text.infill import OtherText
from specexec.text.messages import TEXTS
from specexec.text.pictures import is_picture
from specexec.text.template_options import RESERVED, EndsIn, Wishes

if TYPE_CHECKING:
    from specexec.sampling.grammar import Grammar

MOST_STOPS = 16
SEEDS = 2**53  # of choices: JavaScript reads a JSON number exactly below it
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions; a chat may fill the context

B = TypeVar("B", bound=BaseModel)
R = TypeVar("R", bound="RequestBody")
Message: TypeAlias = dict[str, object]
Prompt: TypeAlias = str | list[int] | list[Message]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSET = -1  # what clients of llama.cpp and vLLM send for "any seed" and "every token"

_LEVELS: dict[str, Level] = {
    "none": "off",
    "off": "off",
    "on": "on",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}

# What each parameter may say without asking for something that we do not have.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "best_of": (None, 1),
    "prompt_logprobs": (None, False),
    "use_beam_search": (None, False),
    "truncate_prompt_tokens": (None, -1),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "chat_template": (None, ""),
    "prompt_embeds": (None,),
    "logits_processors": (None, []),
}
# Names of SamplingParams, by which a request may use everything that the sampler knows.
SAMPLER = {one.name for one in fields(SamplingParams)} - {
    *("grammar", "prompt_logprobs"),
    *ChatRequest.model_fields,
    *CompletionRequest.model_fields,
}
# Accepted because clients send them as a matter of course; none of them changes a text.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
    "parallel_tool_calls",
    "cache_prompt",
    "cache_salt",
    "id_slot",
    "priority",
    "request_id",
    "return_progress",
    "timings_per_token",
    "include_reasoning",
    "reasoning_format",
    "spaces_between_special_tokens",
}


@dataclass(frozen=True)
class HttpRequest:
    """A request in our own words.

    `max_tokens` None fills the context; `watch` adds trees and sweeps to the stream; `shape` is that of the whole
    answer; `wishes` are for the chat template, `thinking` too once its form is known. `chosen` are the fields that were
    set, `ignored` those that are unknown. `notes` has one sentence for everything that is left out. With
    `calls_forbidden` what a model writes as a call is text. An answer that is `cut_by_context` may be shorter than
    `max_tokens`; others are refused if they might be. With a `suffix` it is what stands between its prompt and that.
    """

    chat: bool
    model: str | None
    prompts: list[Prompt]
    sampling: SamplingParams
    max_tokens: int | None
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    watch: bool
    ignored: tuple[str, ...]
    chosen: frozenset[str]
    shape: AnswerShape | None = None
    tools: Tools | None = None
    wishes: Wishes | None = None
    thinking: Level | None = None
    notes: tuple[str, ...] = ()
    calls_forbidden: bool = False
    cut_by_context: bool = False
    suffix: str | None = None
    others: tuple[OtherText, ...] = ()

    def sampling_of(
        self, choice: int, max_tokens: int, fresh_seed: int, grammar: Grammar | None = None
    ) -> SamplingParams:
        """The first choice has the seed that was asked for; every other one a seed derived from it, below 2**53."""
        seed = fresh_seed if self.sampling.seed is None else self.sampling.seed
        return replace(self.sampling, seed=seed_of(choice, seed), max_tokens=max_tokens, grammar=grammar)


def seed_of(choice: int, seed: int) -> int:
    """The seed of a further choice, below 2**53; the first one has that of the request."""
    return seed if choice == 0 else derived_seed(seed, "choice", choice) % SEEDS


def read_chat(body: object, served: Items[str]) -> HttpRequest:
    """A chat completion. Raises ApiError."""
    request = _checked(ChatRequest, body, served)
    messages = [_message(message, index) for index, message in enumerate(request.messages)]
    longest = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    asked = _asked(request, [messages], longest, logprobs, chat=True)
    offer = read_tools(request)
    tools = offer.tools
    if tools and asked.shape and asked.shape.schema is None:
        field = asked.shape.field
        raise bad_request(f"an answer cannot both follow {field} and call tools; a JSON schema can be.", field)
    if tools and request.ignore_eos:
        raise bad_request("tools say where an answer ends, ignore_eos that it does not.", "ignore_eos")
    thinking = _LEVELS.get(request.reasoning_effort or "")
    notes = (*asked.notes, *offer.notes)
    return replace(
        asked,
        tools=tools,
        wishes=_wishes(request, tools),
        thinking=thinking,
        notes=notes,
        calls_forbidden=request.tool_choice == "none",
    )


def read_translated(
    read: Callable[[object, Items[str]], HttpRequest],
    body: object,
    served: Items[str],
    names: Mapping[str, str],
    notes: Items[str],
) -> HttpRequest:
    """A body that another protocol's became. Raises ApiError, with that protocol's `names` of OpenAI's fields."""
    try:
        asked = read(body, served)
    except ApiError as refusal:
        raise refusal.renamed(names) from None
    return replace(asked, notes=(*notes, *asked.notes))


def read_completion(body: object, served: Items[str]) -> HttpRequest:
    """A completion of raw text or token ids, one prompt or several. Raises ApiError."""
    request = _checked(CompletionRequest, body, served)
    prompts = _prompts(request.prompt)
    longest = request.max_tokens or DEFAULT_COMPLETION_TOKENS
    asked = _asked(request, prompts, longest, request.logprobs, chat=False, echo=request.echo)
    if request.suffix is not None:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise bad_request("suffix goes with a prompt that is a text.", "suffix")
        asked = replace(asked, suffix=request.suffix)
    return replace(asked, wishes=Wishes(control_tokens=request.allow_control_tokens))


def _wishes(request: ChatRequest, tools: Tools | None) -> Wishes:
    variables = dict(request.chat_template_kwargs or {})
    if request.documents:
        variables.setdefault("documents", request.documents)
    if taken := sorted(RESERVED & set(variables)):
        raise bad_request(f"chat_template_kwargs may not set {taken[0]!r}.", "chat_template_kwargs")
    if request.continue_final_message and request.messages[-1].get("role") != "assistant":
        raise bad_request("continue_final_message needs an assistant's message at the end.", "continue_final_message")
    after: EndsIn = "answer" if request.add_generation_prompt else "nothing"
    return Wishes(
        tools=tools.offered if tools else (),
        variables=variables,
        ends_in="message" if request.continue_final_message else after,
        control_tokens=request.allow_control_tokens,
    )


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids or not prompt:
        return [ids]
    return [item for item in prompt if not isinstance(item, int)]


def validated(kind: type[B], body: object) -> B:
    """A body of one kind. Raises ApiError, which names the field."""
    try:
        return kind.model_validate(body)
    except ValidationError as problems:
        first = problems.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(step) for step in first["loc"] if not _of_union(step)) or None
        raise bad_request(f"{at or 'the body'}: {first['msg'][0].lower()}{first['msg'][1:]}.", at) from None


def _of_union(step: int | str) -> bool:
    """Whether a step to a fault names one of several types that a field may have, and not the field."""
    return isinstance(step, str) and (step in ("str", "int", "bool") or "[" in step or step[:1].isupper())


def _checked(kind: type[R], body: object, served: Items[str]) -> R:
    request = validated(kind, body)
    for name, harmless in UNSUPPORTED.items():
        value = (request.model_extra or {}).get(name)
        if not any(value == allowed and type(value) is type(allowed) for allowed in harmless):
            raise bad_request(f"{name} is not supported.", name, "unsupported_parameter")
    if request.model is not None and request.model not in served:
        raise unknown_model(request.model, served)
    return request


def unknown_model(name: str, served: Items[str]) -> ApiError:
    """There is no such model here."""
    known = ", ".join(served)
    what = f"no model {name!r} here; known: {known}. `specexec serve --served-name NAME` adds a name."
    return ApiError(404, "model_not_found", what, param="model")


def _message(message: Message, index: int) -> Message:
    """A message as the client sent it, for Encoding to read; what is refused here is refused by its own code."""
    at = f"messages.{index}"
    if message.get("role") not in _ROLES:
        raise bad_request(f"{at}.role: {', '.join(_ROLES)} are known.", f"{at}.role")
    if message.get("function_call"):
        what = "function_call is older than tools and not supported."
        raise bad_request(what, f"{at}.function_call", "unsupported_parameter")
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXTS and not is_picture(part):
            what = f"text and images are read, where the model reads them, not {kind!r}."
            raise bad_request(what, f"{at}.content", "unsupported_content")
    if message.get("reasoning") and not message.get("reasoning_content"):
        return {**message, "reasoning_content": message["reasoning"]}
    return message


def _asked(
    request: RequestBody,
    prompts: list[Prompt],
    max_tokens: int | None,
    logprobs: int | None,
    *,
    chat: bool,
    echo: bool = False,
) -> HttpRequest:
    n = request.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise bad_request(f"{len(prompts) * n} choices were asked for, one request may have {MOST_CHOICES}.", "n")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > MOST_STOPS:
        raise bad_request(f"{len(stop)} stop texts were given, {MOST_STOPS} are allowed.", "stop")
    shape = read_shape(request)
    if shape and request.ignore_eos:
        raise bad_request(f"{shape.field} says where an answer ends, ignore_eos that it does not.", "ignore_eos")
    extra = set(request.model_extra or {}) - set(UNSUPPORTED) - _HARMLESS - SAMPLER
    chosen = {name for name in request.model_fields_set if getattr(request, name) is not None}
    options = request.stream_options
    return HttpRequest(
        chat=chat,
        model=request.model,
        prompts=prompts,
        sampling=_sampling(request, stop, logprobs, echo),
        max_tokens=None if max_tokens == FILL else max_tokens,
        n=n,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        echo=echo,
        watch=request.watch,
        cut_by_context=request.cut_by_context,
        ignored=tuple(sorted(extra)),
        chosen=frozenset(chosen | set(_sampler_fields(request))),
        shape=shape,
        notes=(f"ignored {', '.join(sorted(extra))!r}",) if extra else (),
    )


def _sampler_fields(request: RequestBody) -> dict[str, object]:
    return {name: value for name, value in (request.model_extra or {}).items() if name in SAMPLER and value is not None}


def _sampling(request: RequestBody, stop: tuple[str, ...], logprobs: int | None, echo: bool) -> SamplingParams:
    asked = request.logit_bias or {}
    if not all(re.fullmatch("[0-9]{1,18}", token) for token in asked):
        raise bad_request("logit_bias must have token ids for keys.", "logit_bias")
    biases = tuple((int(token), bias) for token, bias in asked.items())
    try:
        return SamplingParams(
            temperature=request.temperature,
            top_k=0 if request.top_k == _UNSET else request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            seed=None if request.seed == _UNSET else request.seed,
            stop=None if request.stop is None else stop,
            ignore_eos=bool(request.ignore_eos),
            logit_bias=biases,
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
            **_sampler_fields(request),  # type: ignore[arg-type]  # it looks at them itself
        )
    except BadSampling as problem:
        raise bad_request(problem.what, problem.what.split()[0]) from None
