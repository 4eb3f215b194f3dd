"""The forms that are known by name, in the order in which they are tried; a template decides which one is its own."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from specexec.text.formats.json_calls import JsonCalls
from specexec.text.formats.named_calls import NamedCalls
from specexec.text.formats.rules import Rules, Tool
from specexec.text.formats.tagged import Shape

THOUGHTS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
)


class Written(Shape, Protocol):
    """A shape that a grammar can be made of."""

    @property
    def listed(self) -> bool:
        """Whether several calls are one list."""
        ...

    def rules(self, rules: Rules, tools: Items[Tool], parallel: bool) -> str:
        """Rules for a call from behind its first mark; gives the name of theirs."""
        ...


@dataclass(frozen=True)
class CallForm:
    """A named way to write calls. `around` are marks before the first call and after the last, `silent` say nothing.

    `blank` is what a model writes after the first of these marks, between calls, and before the second.
    """

    name: str
    shape: Written
    around: tuple[str, str] = ("", "")
    silent: tuple[str, ...] = ()
    blank: tuple[str, str, str] = ("", "", "")

    @property
    def repeats(self) -> bool:
        """Whether calls follow each other; otherwise one call, or one list of them, is all."""
        return bool(self.shape.begin) and not self.shape.listed


CALLS = (
    CallForm("hermes", JsonCalls("<tool_call>", "</tool_call>", before="\n", after="\n"), blank=("", "\n", "")),
    CallForm(
        "deepseek-v3",
        NamedCalls(
            "<｜tool▁call▁begin｜>",
            "function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```",
            "<｜tool▁call▁end｜>",
        ),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        blank=("", "\n", ""),
    ),
    CallForm(
        "deepseek-v3.1",
        NamedCalls("<｜tool▁call▁begin｜>", "{name}<｜tool▁sep｜>{arguments}", "<｜tool▁call▁end｜>"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    CallForm(
        "kimi-k2",
        NamedCalls(
            "<|tool_call_begin|>",
            "functions.{name}:{index}<|tool_call_argument_begin|>{arguments}",
            "<|tool_call_end|>",
            own_id="functions.{name}:{index}",
        ),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    CallForm("mistral-call-id", NamedCalls("[TOOL_CALLS]", "{name}[CALL_ID]{id}[ARGS]{arguments}")),
    CallForm("mistral-args", NamedCalls("[TOOL_CALLS]", "{name}[ARGS]{arguments}")),
    CallForm("mistral", JsonCalls("[TOOL_CALLS]", listed=True, id="id")),
    CallForm("apriel", JsonCalls("<tool_calls>", "</tool_calls>", listed=True, id="id")),
    CallForm("nemotron-2", JsonCalls("<TOOLCALL>", "</TOOLCALL>", listed=True)),
    CallForm("internlm-2", JsonCalls("<|action_start|><|plugin|>", "<|action_end|>", before="\n")),
    CallForm("gigachat-3.1", JsonCalls("<|function_call|>")),
    CallForm("gigachat-3", JsonCalls("<|message_sep|>\n\nfunction call<|role_sep|>\n")),
    CallForm("granite-20b", JsonCalls("<function_call>", before=" ")),
    CallForm("granite-3", JsonCalls("<|tool_call|>", listed=True)),
    CallForm("apertus", JsonCalls("<|tools_prefix|>", "<|tools_suffix|>", listed=True, keyed=True)),
    CallForm(
        "command",
        JsonCalls(
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            name="tool_name",
            arguments="parameters",
            id="tool_call_id",
            listed=True,
        ),
        silent=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    CallForm(
        "command-r", JsonCalls("Action:\n```json\n", "```", name="tool_name", arguments="parameters", listed=True)
    ),
    CallForm(
        "solar",
        NamedCalls(
            "<|tool_call:begin|>",
            "{id}<|tool_call:name|>{name}<|tool_call:args|>{arguments}",
            "<|tool_call:end|>",
        ),
        ("<|tool_calls|>", "<|calls|>"),
        ("<|content|>",),
    ),
    CallForm("llama-3", JsonCalls("", arguments="parameters")),
    CallForm("json-list", JsonCalls("", listed=True)),
)
