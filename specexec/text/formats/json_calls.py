"""Calls written as JSON: one object with a name and arguments, several one after another, or a list of them."""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from dataclasses import dataclass

from specexec.pieces import Call, Json, Malformed, Unfinished, call_of
from specexec.text.formats.kinds import DECODER, Kinds
from specexec.text.formats.rules import Rules, Tool


@dataclass(frozen=True)
class JsonCalls:
    """`begin` a JSON object or list `end`. An empty `begin` is a whole answer that is a call, an empty `end` its end.

    `before` and `after` are what the template writes between the marks and the JSON, `between` what it writes between
    objects that follow each other, `brackets` those of a list with what separates its items; `keyed` is
    {name: arguments}, `id_first` a family that begins a call with its number.
    """

    begin: str
    end: str = ""
    name: str = "name"
    arguments: str = "arguments"
    id: str | None = None
    listed: bool = False
    keyed: bool = False
    id_first: bool = False
    brackets: tuple[str, str, str] = ("[", ", ", "]")
    before: str = ""
    between: str = ""
    after: str = ""

    @property
    def several(self) -> bool:
        return self.listed or bool(self.between)

    @property
    def literals(self) -> Items[str]:
        key = [] if self.keyed else [f'"{self.name}": ', f'"{self.arguments}": ']
        return [
            self.begin + self.before + (self.brackets[0] + "{" if self.listed else "{"),
            self.after + self.end,
            *key,
        ]

    def calls(self, text: str, kinds: Kinds) -> list[Call]:
        """The calls between the marks. Raises Malformed, Unfinished."""
        found: list[Call] = []
        rest = _without(text.lstrip(), self.before.strip())
        while rest and rest != self.after.strip():
            value, rest = json_at_start(rest)
            found += [self._call(item) for item in (value if isinstance(value, list) else [value])]
            rest = rest.lstrip(" \t\r\n,;")
        if not found:
            raise Malformed
        return found

    def closes(self, text: str) -> bool:
        return True

    def rules(self, rules: Rules, tools: Items[Tool], parallel: bool) -> str:
        """Rules for one call, or for one list of calls, from behind its first mark."""
        one = rules.add("call", " | ".join(self._rule(rules, at, tool) for at, tool in enumerate(tools)))
        many = self._list_of(rules, one, parallel) if self.listed else one
        if self.between and parallel:
            many = f"{one} ({rules.literal(self.between)} {one})*"
        return rules.add("calls", f"{rules.literal(self.before)} {many} {rules.literal(self.after + self.end)}")

    def _list_of(self, rules: Rules, one: str, parallel: bool) -> str:
        opening, comma, closing = map(rules.literal, self.brackets)
        return f"{opening} {one} {f'({comma} {one})*' if parallel else ''} {closing}"

    def _rule(self, rules: Rules, at: int, tool: Tool) -> str:
        arguments = rules.add(f"arguments_{at}", rules.json(tool.schema, tool.lenient))
        name = json.dumps(tool.name, ensure_ascii=False)
        keys = [name] if self.keyed else [f'"{self.name}"', ": ", name, ", ", f'"{self.arguments}"']
        parts = [*([] if self.id_first else ["{"]), *keys, ": "]
        # Without a mark, other JSON may begin alike: cut as llguidance cuts JSON itself, or it would decide too early.
        head = " ".join(map(rules.literal, parts if not self.begin else ["".join(parts)]))
        opening, closing = rules.literal(f'{{"{self.id}": "'), rules.literal('", ')
        number = f"{opening} /[0-9]+/ {closing}" if self.id_first else ""
        after = ""
        if self.id is not None and not self.id_first:
            own, closing = rules.literal(f', "{self.id}": "'), rules.literal('"')
            after = f"({own} /[a-zA-Z0-9_-]+/ {closing})?"
        return rules.add(f"call_{at}", f"{number} {head} {arguments} {after} {rules.literal('}')}")

    def _call(self, item: Json) -> Call:
        if not isinstance(item, dict):
            raise Malformed
        said: tuple[Json, Json] = (item.get(self.name), item.get(self.arguments))
        name, arguments = next(iter(item.items()), said) if self.keyed and len(item) == 1 else said
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise Malformed
        own_id = None if self.id is None else item.get(self.id)
        return call_of(name, arguments, own_id if isinstance(own_id, str) and own_id else None)


def _without(text: str, start: str) -> str:
    return text.removeprefix(start).lstrip() if start else text


def json_at_start(text: str) -> tuple[Json, str]:
    """A JSON value at the start of text, and the rest. Raises Malformed, or Unfinished where text ends within it."""
    try:
        value, end = DECODER.raw_decode(text)
    except json.JSONDecodeError as problem:
        if problem.msg.startswith("Unterminated string") or problem.pos >= len(text):
            raise Unfinished from None
        raise Malformed from None
    except (ValueError, RecursionError):
        raise Malformed from None
    return value, text[end:]
