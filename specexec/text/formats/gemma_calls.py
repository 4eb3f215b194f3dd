"""Calls as Gemma writes them: `call:NAME{key:<|"|>text<|"|>,count:3}`, keys bare and strings between marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from specexec.pieces import Call, Json, Malformed, Unfinished, call_of
from specexec.text.formats.kinds import Kinds, types_of, value_of
from specexec.text.formats.rules import TRUTH, Rules, Tool, options

_HEAD = re.compile(r"\s*call:(?P<name>[^\s{]+)\s*\{")
_KEY = re.compile(r"\s*(?P<key>[^\s:{}\[\],]+)\s*:")
_BARE = re.compile(r"[^,{}\[\]]+")


@dataclass(frozen=True)
class GemmaCalls:
    """`begin` and `end` enclose each call, `quote` each string, or all values."""

    begin: str
    end: str
    quote: str
    quotes_all: bool = False
    several: bool = False

    @property
    def literals(self) -> Items[str]:
        return [self.begin + "call:", "}" + self.end, self.quote]

    def calls(self, text: str, kinds: Kinds) -> list[Call]:
        """The call between the marks. Raises Malformed, Unfinished."""
        head = _HEAD.match(text)
        if head is None:
            raise Malformed
        said = _Values(text, self.quote)
        arguments = said.mapping(head.end())
        if text[said.at :].strip():
            raise Malformed
        if self.quotes_all:
            types = kinds.get(head["name"], {})
            arguments = {
                key: value_of(value, types.get(key, frozenset())) if isinstance(value, str) else value
                for key, value in arguments.items()
            }
        return [call_of(head["name"], arguments)]

    def closes(self, text: str) -> bool:
        return True

    def rules(self, rules: Rules, tools: Items[Tool], parallel: bool) -> str:
        """Rules for a call from behind its first mark."""
        quote = rules.literal(self.quote)
        rules.add("string", f"{quote} {rules.until(self.quote)}")
        rules.add("number", r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/")
        rules.add("pair", r'/[^\s:{}\[\],]+/ ":" value')
        rules.add("mapping", '"{" (pair ("," pair)*)? "}"')
        rules.add("list", '"[" (value ("," value)*)? "]"')
        rules.add("value", 'string | number | "true" | "false" | "null" | mapping | list')
        return rules.add("calls", " | ".join(self._rule(rules, at, tool) for at, tool in enumerate(tools)))

    def _rule(self, rules: Rules, at: int, tool: Tool) -> str:
        must: list[str] = []
        may: list[str] = []
        for key, schema in tool.properties.items() if self.quotes_all else sorted(tool.properties.items()):
            value = self._value_rule(rules, schema, tool)
            (must if key in tool.required else may).append(f"{rules.literal(key + ':')} {value}")
        head = rules.literal(f"call:{tool.name}{{")
        said = options(must, may, ",")
        return rules.add(f"call_{at}", f"{head} {said} {rules.literal('}' + self.end)}")

    def _value_rule(self, rules: Rules, schema: object, tool: Tool) -> str:
        quote = rules.literal(self.quote)
        choices = schema.get("enum") if isinstance(schema, Mapping) else None
        if isinstance(choices, list) and all(isinstance(one, str) for one in choices):
            return f"{quote} ({' | '.join(rules.literal(one) for one in choices)}) {quote}"
        types = types_of(schema)
        if types & {"array", "object", "null"} or not types:
            return "string" if self.quotes_all else "value"
        if types == {"string"}:
            return "string"
        bare = f"({TRUTH})" if types == {"boolean"} else rules.json(tool.inner(schema), tool.lenient)
        return f"{quote} {bare} {quote}" if self.quotes_all else f"({bare})" if "string" not in types else "value"


class _Values:
    """Reads values from `at` on."""

    def __init__(self, text: str, quote: str) -> None:
        self._text = text
        self._quote = quote
        self.at = 0

    def mapping(self, at: int) -> dict[str, Json]:
        """Keys and values up to the closing brace."""
        self.at = at
        found: dict[str, Json] = {}
        while not self._closed("}"):
            key = _KEY.match(self._text, self.at)
            if key is None:
                raise Malformed
            self.at = key.end()
            found[key["key"]] = self._value()
            self._comma("}")
        return found

    def _value(self) -> Json:
        self._blank()
        if self._text.startswith(self._quote, self.at):
            return self._string()
        if self._text[self.at : self.at + 1] == "{":
            return self.mapping(self.at + 1)
        if self._text[self.at : self.at + 1] == "[":
            return self._list()
        bare = _BARE.match(self._text, self.at)
        if bare is None:
            raise Unfinished if self.at >= len(self._text) else Malformed
        self.at = bare.end()
        return value_of(bare[0].strip(), frozenset())

    def _string(self) -> str:
        start = self.at + len(self._quote)
        stop = self._text.find(self._quote, start)
        if stop < 0:
            raise Unfinished
        self.at = stop + len(self._quote)
        return self._text[start:stop]

    def _list(self) -> list[Json]:
        self.at += 1
        found: list[Json] = []
        while not self._closed("]"):
            found.append(self._value())
            self._comma("]")
        return found

    def _closed(self, mark: str) -> bool:
        self._blank()
        if self._text[self.at : self.at + 1] != mark:
            return False
        self.at += 1
        return True

    def _comma(self, closing: str) -> None:
        self._blank()
        following = self._text[self.at : self.at + 1]
        if following not in (",", closing):
            raise Malformed if following else Unfinished
        self.at += following == ","

    def _blank(self) -> None:
        while self._text[self.at : self.at + 1].isspace():
            self.at += 1
