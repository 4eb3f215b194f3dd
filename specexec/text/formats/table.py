"""The known formats, in the order in which they are tried; a template decides which one is its own."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from specexec.text.formats.channels import Channels
from specexec.text.formats.gemma_calls import GemmaCalls
from specexec.text.formats.json_calls import JsonCalls
from specexec.text.formats.named_calls import NamedCalls
from specexec.text.formats.python_calls import PythonCalls
from specexec.text.formats.rules import Rules, Tool
from specexec.text.formats.tagged import CallShape
from specexec.text.formats.xml_calls import XmlCalls

THOUGHTS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("[THINK]", "[/THINK]"),
    ("<|think|>", "<|end|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
)

_DSML = XmlCalls(
    "<｜DSML｜invoke",
    ' name="{name}">\n',
    '<｜DSML｜parameter name="{key}" string="{kind}">{value}</｜DSML｜parameter>\n',
    end="</｜DSML｜invoke>",
)


class WrittenShape(CallShape, Protocol):
    """A shape that a grammar can be made of."""

    @property
    def several(self) -> bool:
        """Whether all calls of an answer are between one pair of marks."""
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
    shape: WrittenShape
    around: tuple[str, str] = ("", "")
    silent: tuple[str, ...] = ()
    blank: tuple[str, str, str] = ("", "", "")

    @property
    def repeats(self) -> bool:
        """Whether calls follow each other; otherwise one call, or one list of them, is all."""
        return bool(self.shape.begin) and not self.shape.several


@dataclass(frozen=True)
class ChannelForm:
    """A named way to write an answer as messages."""

    name: str
    channels: Channels


CHANNELS = (
    ChannelForm(
        "harmony",
        Channels(
            "<|start|>",
            "<|message|>",
            ("<|end|>", "<|call|>", "<|return|>"),
            "<|channel|>analysis",
            prefix="functions.",
            channel="<|channel|>",
            constrain="<|constrain|>",
        ),
    ),
    ChannelForm(
        "muse",
        Channels(
            "<|start|>",
            "<|message|>",
            ("<|eom|>", "<|eot|>"),
            "to=self",
            no_tool=("self", "user"),
            answer="user",
            shape=XmlCalls(
                "<atem:function_calls>",
                '\n<atem:invoke name="{name}">\n',
                '<atem:parameter name="{key}">{value}</atem:parameter>\n',
                "</atem:invoke>\n",
                "</atem:function_calls>",
            ),
        ),
    ),
)

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
    CallForm("tool-calls", JsonCalls("<tool_calls>", "</tool_calls>", listed=True, id="id")),
    CallForm("minimax-m1", JsonCalls("<tool_calls>", "</tool_calls>", before="\n", after="\n", between="\n")),
    CallForm("nemotron-2", JsonCalls("<TOOLCALL>", "</TOOLCALL>", listed=True)),
    CallForm("internlm-2", JsonCalls("<|action_start|><|plugin|>", "<|action_end|>", before="\n")),
    CallForm("gigachat-3.1", JsonCalls("<|function_call|>")),
    CallForm("granite-20b", JsonCalls("<function_call>", before=" "), blank=("", "\n", "")),
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
            id_first=True,
            brackets=("[\n    ", ",\n    ", "\n]"),
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
        ("<|content|>", "<|begin|>assistant"),
    ),
    CallForm(
        "qwen3-coder",
        XmlCalls(
            "<tool_call>",
            "\n<function={name}>\n",
            "<parameter={key}>\n{value}\n</parameter>\n",
            "</function>\n",
            "</tool_call>",
        ),
        blank=("", "\n", ""),
    ),
    CallForm(
        "seed",
        XmlCalls(
            "<seed:tool_call>",
            "\n<function={name}>\n",
            "<parameter={key}>{value}</parameter>\n",
            "</function>\n",
            "</seed:tool_call>",
        ),
        blank=("", "\n", ""),
    ),
    CallForm(
        "glm-4.5",
        XmlCalls(
            "<tool_call>",
            "{name}\n",
            "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
            end="</tool_call>",
        ),
        blank=("", "\n", ""),
    ),
    CallForm(
        "glm-4.7",
        XmlCalls("<tool_call>", "{name}", "<arg_key>{key}</arg_key><arg_value>{value}</arg_value>", end="</tool_call>"),
    ),
    CallForm(
        "hunyuan-3",
        XmlCalls(
            "<tool_call:opensource>",
            "{name}<tool_sep:opensource>\n",
            "<arg_key:opensource>{key}</arg_key:opensource>\n<arg_value:opensource>{value}</arg_value:opensource>\n",
            end="</tool_call:opensource>",
        ),
        ("<tool_calls:opensource>", "</tool_calls:opensource>"),
        blank=("\n", "\n", "\n"),
    ),
    CallForm(
        "minimax-m2",
        XmlCalls("<invoke", ' name="{name}">\n', '<parameter name="{key}">{value}</parameter>\n', end="</invoke>"),
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        blank=("\n", "\n", "\n"),
    ),
    CallForm(
        "deepseek-v3.2",
        _DSML,
        ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        blank=("\n", "\n", "\n"),
    ),
    CallForm(
        "deepseek-v4",
        _DSML,
        ("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
        blank=("\n", "\n", "\n"),
    ),
    CallForm(
        "minicpm-5",
        XmlCalls(
            "<function",
            ' name="{name}">',
            '<param name="{key}">{value}</param>',
            end="</function>",
            cdata=True,
        ),
        blank=("", "\n", ""),
    ),
    CallForm(
        "kimi-k3",
        XmlCalls(
            "<|open|>call",
            ' tool="{name}" index="{index}"<|sep|>',
            '<|open|>argument key="{key}" type="{kind}"<|sep|>{value}<|close|>argument<|sep|>',
            end="<|close|>call<|sep|>",
        ),
        ("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
    ),
    CallForm("lfm-2", PythonCalls("<|tool_call_start|>", "<|tool_call_end|>")),
    CallForm("gemma-4", GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>'), silent=("<|tool_response>",)),
    CallForm(
        "functiongemma",
        GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>", quotes_all=True),
    ),
    CallForm("functionary-3.1", NamedCalls("<function=", "{name}>{arguments}", "</function>")),
    CallForm("llama-3", JsonCalls("", arguments="parameters", between="; ")),
    CallForm("json-list", JsonCalls("", listed=True)),
    CallForm("phi-4-mini", JsonCalls("", between=",")),
    CallForm("pythonic", PythonCalls("")),
)
