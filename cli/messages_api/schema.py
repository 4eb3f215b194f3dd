"""What the body of /v1/messages may hold. Blocks of content are read one by one, by read.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cli.openai.schema import Whole

Block = dict[str, object]
Content = str | list[Block]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class ChatTurn(_Open):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Content


class ToolDefinition(_Open):
    """A tool of the client's own, or of Anthropic's, which has another type."""

    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, object] | None = None


class MessagesToolChoice(_Open):
    """What the model must do with its tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(_Open):
    """Whether the model thinks first; how much it does is `output_config.effort`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Whole | None = None


class OutputFormat(_Open):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(_Open):
    """How much to think, and what the answer must look like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(_Open):
    """The body of /v1/messages/count_tokens."""

    model: str | None = None
    messages: Annotated[list[ChatTurn], Field(min_length=1)]
    system: Content | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its place before there was `output_config`


class MessagesRequest(CountRequest):
    """The body of /v1/messages."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    seed: Whole | None = None
