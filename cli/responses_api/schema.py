"""What the body of /v1/responses may hold. Items of the input are read one by one, by items.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cli.openai.schema import Effort, Length, OpenBody, Sampled

Item = dict[str, object]


class TextFormat(OpenBody):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, object] | None = Field(alias="schema", default=None)


class TextConfig(OpenBody):
    """How the answer is written."""

    format: TextFormat | None = None


class ReasoningConfig(OpenBody):
    """How much to think, and whether thoughts come as a summary."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class NamedTool(OpenBody):
    """A choice of tools: one function that must be called, or a kind that is not known here."""

    type: str
    name: str | None = None


class PromptRequest(OpenBody):
    """The body of /v1/responses/input_tokens, which asks for no answer."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Item] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None


class ResponsesRequest(PromptRequest, Sampled):
    """The body of /v1/responses."""

    max_output_tokens: Length | None = None
    stop: str | list[str] | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
