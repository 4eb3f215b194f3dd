"""What the bodies of /api/chat and /api/generate may hold."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cli.openai.schema import OpenBody, Sampled, Whole


class Options(Sampled):
    """Sampling; what is about the machine is decided when the server starts."""

    num_predict: Whole | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class OllamaRequest(OpenBody):
    """What both share."""

    model: str | None = None
    stream: bool | None = None
    format: dict[str, object] | str | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None


class OllamaEmbed(OpenBody):
    """The body of /api/embed. Texts that are too long are cut, unless `truncate` is false."""

    model: str | None = None
    input: str | list[str] = Field(default=[])
    truncate: bool | None = None
    dimensions: Whole | None = None


class OllamaMessage(OpenBody):
    """One message. Calls have no ids: a result belongs to the first call of that tool without one."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[dict[str, object]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChat(OllamaRequest):
    """The body of /api/chat."""

    messages: list[OllamaMessage] | None = None
    tools: list[dict[str, object]] | None = None


class OllamaGenerate(OllamaRequest):
    """The body of /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[str] | None = None
