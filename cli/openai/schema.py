"""What a request body may hold, field by field. Unknown fields are noticed by parse.py."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MOST_CHOICES = 16
MOST_LOGPROBS = 20
FILL = -1  # a length: as much as the context holds


def _integral(value: object) -> object:
    """JSON knows one kind of number, and some clients write 100.0 for 100."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _positive_or_fill(value: int) -> int:
    if value < 1 and value != FILL:
        raise ValueError("must be 1 or more, or -1 to fill the context")
    return value


def _spelled(value: object) -> object:
    """Seeds beyond 53 bits come as text from those whose JSON numbers have no more."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value, re.ASCII) else value


def _seed(value: int) -> int:
    """Its bounds are ours: pydantic would say them as rounded floating-point numbers."""
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"must be between {-(2**63)} and {2**64 - 1}")
    return value


Whole = Annotated[int, BeforeValidator(_integral)]
_SEEDS: dict[str, object] = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^-?[0-9]{1,20}$"}]}
Seed = Annotated[Whole, BeforeValidator(_spelled), AfterValidator(_seed), WithJsonSchema(_SEEDS)]
Length = Annotated[Whole, AfterValidator(_positive_or_fill)]


class OpenBody(BaseModel):
    """What may hold fields that are not known: those are noticed later, and answered all the same."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Sampled(OpenBody):
    """How tokens are chosen, as far as all APIs have the same words for it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    seed: Whole | None = None


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Schema(BaseModel):
    """What `response_format` holds under json_schema."""

    model_config = ConfigDict(strict=True)
    schema_: dict[str, object] | None = Field(alias="schema", default=None)
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer must look like."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    schema_: dict[str, object] | None = Field(alias="schema", default=None)  # where llama.cpp's clients put it

    @property
    def schema_to_follow(self) -> dict[str, object] | None:
        """The JSON schema of the whole answer; None for plain text."""
        if self.type == "json_schema":
            return (self.json_schema and self.json_schema.schema_) or self.schema_ or {"type": "object"}
        return (self.schema_ or {"type": "object"}) if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's word for what an answer must look like: one of these."""

    model_config = ConfigDict(extra="forbid", strict=True)
    json_: dict[str, object] | str | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ChosenFunction(BaseModel):
    """The name of the function that must be called."""

    model_config = ConfigDict(strict=True)
    name: str


class TokenizeRequest(OpenBody):
    """The body of /tokenize: one of content, prompt (both text) and messages, with what else makes their prompt."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: list[dict[str, object]] | None = None
    tools: list[dict[str, object]] | None = None
    chat_template_kwargs: dict[str, object] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    allow_control_tokens: bool | None = None
    parse_special: bool | None = None


class ToolChoice(BaseModel):
    """One function that must be called."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: ChosenFunction


Effort = Literal["none", "off", "on", "minimal", "low", "medium", "high", "xhigh", "max"]


class RequestBody(Sampled):
    """What chat and plain completion share."""

    model: str | None = None
    max_tokens: Length | None = Field(validation_alias=AliasChoices("max_tokens", "n_predict"), default=None)
    min_p: float | None = None
    repetition_penalty: float | None = Field(
        validation_alias=AliasChoices("repetition_penalty", "repeat_penalty"), default=None
    )
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, object] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: dict[str, object] | None = None
    allow_control_tokens: bool | None = None
    watch: bool = False
    cut_by_context: bool = False


class ChatRequest(RequestBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, object]], Field(min_length=1)]
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, object] | None = None
    documents: list[dict[str, object]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class CompletionRequest(RequestBody):
    """The body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    suffix: str | None = None
    echo: bool = False
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
