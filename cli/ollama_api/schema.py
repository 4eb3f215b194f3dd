"""What the bodies of /api/chat and /api/generate may hold."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from cli.openai.schema import Whole


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Options(_Open):
    """Sampling; what is about the machine is decided when the server starts."""

    num_predict: Whole | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class OllamaRequest(_Open):
    """What both share."""

    model: str | None = None
    stream: bool | None = None
    format: dict[str, object] | str | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None


class OllamaEmbed(_Open):
    """The body of /api/embed. Texts that are too long are cut, unless `truncate` is false."""

    model: str | None = None
    input: str | list[str] = []
    truncate: bool | None = None
    dimensions: Whole | None = None


class OllamaMessage(_Open):
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
