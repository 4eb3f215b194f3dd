"""Calls written with a mark around every argument, whose value is bare text: Qwen3-Coder, GLM, MiniMax and others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from specexec.pieces import Call, Json, Malformed, Unfinished, call_of
from specexec.text.formats.kinds import Kinds, types_of, value_of
from specexec.text.formats.rules import TRUTH, Rules, Tool

HOLES = re.compile(r"\{(name|id|index|arguments|key|kind|value)\}")
_NAME = r"[^\s<>\"\ud800-\udfff]+"
_CDATA = ("<![CDATA[", "]]>")


@dataclass(frozen=True)
class XmlCalls:
    """`begin`, `head` with {name}, `parameter` with {key} and {value} for each argument, `tail`, `end`.

    {kind} says whether a value is a string, {index} counts the calls.
    """

    begin: str
    head: str
    parameter: str
    tail: str = ""
    end: str = ""
    cdata: bool = False
    several: bool = False

    @property
    def literals(self) -> Items[str]:
        return [*literals_of(self.begin + self.head), *literals_of(self.parameter), self.tail + self.end]

    def calls(self, text: str, kinds: Kinds) -> list[Call]:
        """The call between the marks. Raises Malformed, Unfinished."""
        found = re.match(_pattern(self.head), text)
        if found is None:
            raise Malformed
        name = found["name"]
        arguments: dict[str, Json] = {}
        at = found.end()
        while parameter := self._opening.match(text, at):
            stop = self._value_end(text, parameter.end())
            value = text[parameter.end() : stop.start()]
            arguments[parameter["key"]] = self._value(
                value, parameter.groupdict().get("kind"), kinds.get(name, {}).get(parameter["key"])
            )
            at = stop.end()
        if text[at:].strip() != self.tail.strip():
            raise Unfinished if self.tail.strip().startswith(text[at:].strip()) else Malformed
        return [call_of(name, arguments)]

    @property
    def _opening(self) -> re.Pattern[str]:
        return re.compile(_pattern(self.parameter.partition("{value}")[0]))

    def _value_end(self, text: str, at: int) -> re.Match[str]:
        """Where a value ends: at its closing mark, if what comes next may come next."""
        closing = self.parameter.partition("{value}")[2]
        padded = r"\n?" if closing.startswith("\n") else ""
        after = rf"(?={self._opening.pattern}|\s*{re.escape(self.tail.strip())}\s*\Z)"
        found = re.compile(f"{padded}{re.escape(closing.strip())}{after}").search(text, at)
        if found is None:
            raise Unfinished
        return found

    def _value(self, text: str, kind: str | None, types: frozenset[str] | None) -> Json:
        if self.parameter.partition("{value}")[0].endswith("\n"):
            text = text.removeprefix("\n")
        if self.cdata and text.startswith(_CDATA[0]) and text.endswith(_CDATA[1]):
            return text[len(_CDATA[0]) : -len(_CDATA[1])]
        if kind is not None:
            return text if kind in ("true", "string") else value_of(text, frozenset())
        return value_of(text, types or frozenset())

    def closes(self, text: str) -> bool:
        return bool(self.tail)

    def rules(self, rules: Rules, tools: Items[Tool], parallel: bool) -> str:
        """Rules for a call from behind its first mark."""
        return rules.add("calls", " | ".join(self._rule(rules, at, tool) for at, tool in enumerate(tools)))

    def _rule(self, rules: Rules, at: int, tool: Tool) -> str:
        arguments = []
        for number, (key, schema) in enumerate(tool.properties.items()):
            rule = self._parameter_rule(rules, f"argument_{at}_{number}", key, schema, tool)
            arguments.append(rule if key in tool.required else f"{rule}?")
        head = self._written(rules, self.head, {"name": rules.literal(tool.name), "index": "/[0-9]+/"})
        return rules.add(f"call_{at}", f"{head} {' '.join(arguments)} {rules.literal(self.tail + self.end)}")

    def _parameter_rule(self, rules: Rules, name: str, key: str, schema: object, tool: Tool) -> str:
        """One argument: text as it is where a string may come, otherwise JSON."""
        types = types_of(schema)
        bare = "string" in types or not types
        before, _, after = self.parameter.partition("{value}")
        kind = '"true" | "string"' if bare else '"false" | /[a-z]+/'
        head = self._written(rules, before, {"key": rules.literal(key), "kind": f"({kind})"})
        choices = schema.get("enum") if isinstance(schema, Mapping) else None
        if isinstance(choices, list) and all(isinstance(one, str) for one in choices):
            body = f"({' | '.join(rules.literal(one) for one in choices)}) {rules.literal(after)}"
        elif types == {"boolean"}:
            body = f"({TRUTH}) {rules.literal(after)}"
        elif not bare:
            body = f"{rules.json(tool.inner(schema), tool.lenient)} {rules.literal(after)}"
        else:
            body = rules.until(after)
        return rules.add(name, f"{head} {body}")

    @staticmethod
    def _written(rules: Rules, text: str, said: Mapping[str, str]) -> str:
        parts = HOLES.split(text)
        return " ".join(said[part] if at % 2 else rules.literal(part) for at, part in enumerate(parts) if part)


def literals_of(text: str) -> list[str]:
    """The parts of a text with holes that are always the same."""
    return HOLES.split(text)[::2]


def _pattern(text: str) -> str:
    """A part of a call as a regular expression that is lenient about blank space."""
    holes = {"name": f"(?P<name>{_NAME})", "index": "[0-9]+", "key": r"(?P<key>[^\n]+?)", "kind": "(?P<kind>[a-z]+)"}
    parts = HOLES.split(text.strip())
    return r"\s*" + "".join(holes[part] if at % 2 else blank(part) for at, part in enumerate(parts))


def blank(text: str) -> str:
    """Literal text as a regular expression, in which any blank space is as good as any other."""
    words = [re.escape(word) for word in text.split()]
    edges = (r"\s*" if text[:1].isspace() else "", r"\s*" if text[-1:].isspace() and words else "")
    return edges[0] + r"\s*".join(words) + edges[1]
