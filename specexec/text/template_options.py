"""Variables of a chat template besides the messages. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# What apply_chat_template itself takes: no variable may replace the template or its messages.
RESERVED = {
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}

EndsIn = Literal["answer", "message", "nothing"]


@dataclass(frozen=True)
class Wishes:
    """`tools` are function definitions in OpenAI's shape, `variables` what this template alone understands.

    `control_tokens` says whether those that are spelled in messages or raw text become tokens; None leaves it to the
    encoding.

    The text ends where an answer begins ("answer"), in the middle of the last message ("message"), or after it
    ("nothing").
    """

    tools: tuple[dict[str, object], ...] = ()
    variables: Mapping[str, object] = field(default_factory=dict)
    ends_in: EndsIn = "answer"
    control_tokens: bool | None = None
