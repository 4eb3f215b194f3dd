"""JSON schemas in the form grammars take: on one line, and without what cannot be enforced, which is reported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llguidance import LLMatcher

from specexec.errors import BadGrammar
from specexec.sampling.large_stack import on_large_stack

# On one line, as Python's json.dumps writes it: a small model that may put blank space anywhere fills the page with it.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CHILDREN = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # of names to schemas
_DEFINITIONS = ("$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


def laid_out(schema: Mapping[str, object], lenient: bool) -> dict[str, object]:
    """A schema that says how its JSON is laid out, for use inside a Lark grammar (`%json`)."""
    return {**schema, "x-guidance": {**_LAYOUT, "lenient": lenient}}


def followed(schema: Mapping[str, object]) -> dict[str, object]:
    """The schema, every part of which a grammar can hold to. Raises BadGrammar for what it cannot."""
    found = usable(schema, False)
    if found.notes:  # half a schema for a whole answer is not what was asked for
        raise BadGrammar(f"the schema cannot be followed: {' '.join(found.notes)}")
    return found.schema


@dataclass
class Usable:
    """A schema without the parts that no grammar can be made of; `notes` names those."""

    schema: dict[str, object]
    notes: list[str] = field(default_factory=list)


def usable(schema: Mapping[str, object], lenient: bool = True) -> Usable:
    """As much of a schema as can be enforced. A keyword that cannot costs only itself."""
    problem, warnings = _tried(schema, schema, lenient)
    if problem is None:
        return Usable(dict(schema), warnings)
    notes: list[str] = []
    root = dict(schema)
    for path, inner in _inner(schema):
        if path[0] in _DEFINITIONS:
            _put(root, path, _mended(inner, root, lenient, f"/{'/'.join(path)}", notes))
    return Usable(_mended(root, root, lenient, "", notes), notes)


def _mended(
    schema: Mapping[str, object], root: Mapping[str, object], lenient: bool, place: str, notes: list[str]
) -> dict[str, object]:
    """The schema with the parts left out that make it unusable, the innermost first."""
    good = dict(schema)
    for path, inner in _inner(schema):
        if _problem(inner, root, lenient):
            _put(good, path, _mended(inner, root, lenient, f"{place}/{'/'.join(path)}", notes))
    for keyword in [key for key in good if key not in ("type", *_CHILDREN[:1])]:
        if (problem := _problem(good, root, lenient)) is None:
            return good
        without = {key: value for key, value in good.items() if key != keyword}
        if _problem(without, root, lenient) != problem:
            notes.append(f"{place or '/'}: {keyword} is left out: {problem}")
            good = without
    if problem := _problem(good, root, lenient):
        notes.append(f"{place or '/'} may be anything: {problem}")
        return {}
    return good


def _inner(schema: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], Mapping[str, object]]]:
    for key, value in schema.items():
        if key in _CHILDREN and isinstance(value, Mapping):
            yield from (((key, name), inner) for name, inner in value.items() if isinstance(inner, Mapping))
        elif key in _LISTS and isinstance(value, list):
            yield from (((key, str(at)), inner) for at, inner in enumerate(value) if isinstance(inner, Mapping))
        elif key in _ONE and isinstance(value, Mapping):
            yield (key,), value


def _put(schema: dict[str, object], path: tuple[str, ...], inner: dict[str, object]) -> None:
    key = path[0]
    holder = schema[key]
    if len(path) == 1:
        schema[key] = inner
    elif isinstance(holder, Mapping):
        schema[key] = {**holder, path[1]: inner}
    elif isinstance(holder, list):
        schema[key] = [inner if str(at) == path[1] else item for at, item in enumerate(holder)]


def _problem(schema: Mapping[str, object], root: Mapping[str, object], lenient: bool) -> str | None:
    return _tried(schema, root, lenient)[0]


def _tried(schema: Mapping[str, object], root: Mapping[str, object], lenient: bool) -> tuple[str | None, list[str]]:
    """Why no grammar can be made of a schema that may refer to definitions of `root`, and what is passed over in it."""
    whole = {**{key: root[key] for key in _DEFINITIONS if key in root}, **schema}
    text = f"start: %json {json.dumps(laid_out(whole, lenient))}"
    failed, lines = on_large_stack(lambda: LLMatcher.validate_grammar_with_warnings(text))
    if not failed:
        return None, list(lines)
    said = lines[-1].splitlines()
    return next((line.removeprefix("error: ") for line in said if line.startswith("error:")), said[0]), []
