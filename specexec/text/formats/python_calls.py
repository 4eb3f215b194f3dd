"""Calls written as Python: `[get_weather(city='Paris', days=3), look_up(word="x")]`.

Templates of such models write strings as they are, without escapes and some without quotes, so that what they write is
often no Python; it is then split at its names.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from specexec.pieces import Call, Json, Malformed, Unfinished, call_of
from specexec.text.formats.kinds import Kinds, types_of, value_of
from specexec.text.formats.rules import TRUTH, Rules, Tool, options

_HEAD = re.compile(r"\s*(?P<name>[\w.-]+)\(")
_NEXT_CALL = re.compile(r"(?<=\)),\s*(?=[\w.-]+\()")
_NAME = re.compile(r"(?:(?<=\()|,)\s*(?P<name>\w+)=")
_WORDS: dict[str, Json] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class PythonCalls:
    """`begin` a Python list of calls `end`. Without marks, a whole answer that is such a list."""

    begin: str
    end: str = ""
    several: bool = True

    @property
    def literals(self) -> Items[str]:
        return [self.begin + "[", "]" + self.end]

    def calls(self, text: str, kinds: Kinds) -> list[Call]:
        """The calls between the marks. Raises Malformed, Unfinished."""
        text = text.strip()
        try:
            body = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as problem:
            if text.startswith("[") and text.endswith(")]"):
                return _loose_calls(text[1:-1], kinds)
            cut = "never closed" in str(problem) or "unterminated" in str(problem)
            raise (Unfinished if cut else Malformed) from None
        if not isinstance(body, ast.List) or not body.elts:
            raise Malformed
        return [_call(item, kinds) for item in body.elts]

    def closes(self, text: str) -> bool:
        """Only if it is Python: where strings are not quoted, a bracket may be inside one."""
        try:
            ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
        return True

    def rules(self, rules: Rules, tools: Items[Tool], parallel: bool) -> str:
        """Rules for the list from behind its first mark."""
        one = rules.add("call", " | ".join(self._rule(rules, at, tool) for at, tool in enumerate(tools)))
        more = f'(", " {one})*' if parallel else ""
        return rules.add("calls", f'"[" {one} {more} "]" {rules.literal(self.end)}')

    def _rule(self, rules: Rules, at: int, tool: Tool) -> str:
        must: list[str] = []
        may: list[str] = []
        for number, (key, schema) in enumerate(tool.properties.items()):
            value = _value_rule(rules, f"argument_{at}_{number}", schema, tool)
            (must if key in tool.required else may).append(f"{rules.literal(key + '=')} {value}")
        return rules.add(f"call_{at}", f'{rules.literal(tool.name + "(")} {options(must, may, ", ")} ")"')


def _value_rule(rules: Rules, name: str, schema: object, tool: Tool) -> str:
    """A Python literal: for a string that is free, in either kind of quotes; otherwise JSON, which reads the same."""
    free = isinstance(schema, Mapping) and not schema.keys() - {"type", "description", "title", "default"}
    if free and types_of(schema) == {"string"}:
        return rules.add(name, r"""/'([^'\\\n]|\\[^\n])*'/ | /"([^"\\\n]|\\[^\n])*"/""")
    if free and types_of(schema) == {"boolean"}:
        return rules.add(name, TRUTH)
    return rules.add(name, rules.json(tool.inner(schema), tool.lenient))


def _loose_calls(text: str, kinds: Kinds) -> list[Call]:
    found: list[Call] = []
    for written in _NEXT_CALL.split(text):
        head = _HEAD.match(written)
        if head is None or not written.endswith(")"):
            raise Malformed
        names = [*_NAME.finditer(written, head.end() - 1)]
        ends = [name.start() for name in names[1:]] + [len(written) - 1]
        types = kinds.get(head["name"], {})
        arguments = {
            name["name"]: value_of(_unquoted(written[name.end() : end]), types.get(name["name"], frozenset()))
            for name, end in zip(names, ends, strict=False)
        }
        found.append(call_of(head["name"], arguments))
    return found


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    return text[1:-1] if quoted else text


def _call(item: ast.expr, kinds: Kinds) -> Call:
    if not isinstance(item, ast.Call) or item.args:
        raise Malformed
    name = ast.unparse(item.func)
    types = kinds.get(name, {})
    arguments = {
        word.arg: _fitting(word.value, types.get(word.arg, frozenset()))
        for word in item.keywords
        if word.arg is not None
    }
    if len(arguments) != len(item.keywords):
        raise Malformed
    return call_of(name, arguments)


def _fitting(node: ast.expr, types: frozenset[str]) -> Json:
    """The value, read again where the tool wants a string and none is written, or the other way round."""
    value = _value(node)
    if types == {"string"} and not isinstance(value, str):
        return ast.unparse(node)
    return value_of(value, types) if isinstance(value, str) and types else value


def _value(node: ast.expr) -> Json:
    match node:
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_value(key) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise Malformed
            return {str(name): _value(value) for name, value in zip(names, values, strict=True)}
    try:
        value = ast.literal_eval(node)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        raise Malformed from None
    return value
