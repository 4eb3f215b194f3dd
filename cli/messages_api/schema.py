"""What the body of /v1/messages may hold. Blocks of content are read one by one, by read.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cli.openai.schema import OpenBody, Sampled, Whole

Block = dict[str, object]
Content = str | list[Block]


class ChatTurn(OpenBody):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Content


class ToolDefinition(OpenBody):
    """A tool of the client's own, or of Anthropic's, which has another type."""

    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, object] | None = None


class MessagesToolChoice(OpenBody):
    """What the model must do with its tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(OpenBody):
    """Whether the model thinks first; how much it does is `output_config.effort`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Whole | None = None


class OutputFormat(OpenBody):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(OpenBody):
    """How much to think, and what the answer must look like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(OpenBody):
    """The body of /v1/messages/count_tokens."""

    model: str | None = None
    messages: Annotated[list[ChatTurn], Field(min_length=1)]
    system: Content | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its place before there was `output_config`


class MessagesRequest(CountRequest, Sampled):
    """The body of /v1/messages."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
