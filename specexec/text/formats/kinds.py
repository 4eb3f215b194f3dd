"""The types of a tool's parameters, for families that write arguments as bare text. Knows no marks."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from specexec.pieces import Json

Kinds: TypeAlias = Mapping[str, Mapping[str, frozenset[str]]]  # tool → parameter → types its schema names

_WORDS: dict[str, Json] = {"True": True, "False": False, "None": None}


def kinds_of(tools: Iterable[Mapping[str, object]]) -> Kinds:
    """What the schemas of these definitions say about each parameter; nothing where they say nothing."""
    found: dict[str, dict[str, frozenset[str]]] = {}
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, Mapping):
            continue
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            found[str(function.get("name"))] = {key: types_of(schema) for key, schema in properties.items()}
    return found


def types_of(schema: object) -> frozenset[str]:
    """The JSON types that a schema allows, as far as it names them."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else set(named) if isinstance(named, list) else set()
    for choice in ("anyOf", "oneOf"):
        if isinstance(schema.get(choice), list):
            types |= {one for inner in schema[choice] for one in types_of(inner)}
    if isinstance(schema.get("enum"), list) and all(isinstance(one, str) for one in schema["enum"]):
        types.add("string")
    return frozenset(str(one) for one in types)


def value_of(text: str, types: frozenset[str]) -> Json:
    """Bare text as the value it means: a string where only that is allowed, otherwise what it can be read as."""
    if types == {"string"}:
        return text
    value = _read(text)
    if isinstance(value, str) or ("string" in types and not _fits(value, types)):
        return text
    return value


def _read(text: str) -> Json:
    """JSON, or a Python literal as templates write lists and truth values; otherwise the text itself."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        pass
    if text in _WORDS:
        return _WORDS[text]
    try:
        value = ast.literal_eval(text) if text[:1] in ("[", "{") else text
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value


def _fits(value: Json, types: frozenset[str]) -> bool:
    names = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, list: {"array"}, dict: {"object"}}
    return bool(types & names.get(type(value), {"null"}))


def _refuse(constant: str) -> Json:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is too large a number")
    return value


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)  # json.dumps writes what it reads as JSON
