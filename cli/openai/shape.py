"""What a whole answer must look like: the one wish among the fields of OpenAI's, vLLM's and llama.cpp's clients."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cli.openai.errors import bad_request
from cli.openai.schema import Request


@dataclass(frozen=True)
class Shape:
    """JSON that a schema describes, or text that a regex matches from end to end. `field` is where it was asked for."""

    field: str
    schema: Mapping[str, object] | None = None
    regex: str | None = None


def read_shape(request: Request) -> Shape | None:
    """What the answer must look like; None for plain text. Raises ApiError."""
    given = request.response_format
    outputs = request.structured_outputs
    wanted = [
        ("response_format", given and given.schema_to_follow, None),
        ("guided_json", _schema(request.guided_json, "guided_json"), None),
        ("json_schema", request.json_schema, None),
        ("guided_regex", None, request.guided_regex),
        ("guided_choice", None, _one_of(request.guided_choice)),
        ("structured_outputs", outputs and _schema(outputs.json_, "structured_outputs"), None),
        ("structured_outputs", {"type": "object"} if outputs and outputs.json_object else None, None),
        ("structured_outputs", None, outputs and outputs.regex),
        ("structured_outputs", None, _one_of(outputs and outputs.choice)),
    ]
    shapes = [Shape(name, schema, regex) for name, schema, regex in wanted if schema is not None or regex is not None]
    if len(shapes) > 1:
        raise bad_request(
            f"{shapes[0].field} and {shapes[1].field} both say what an answer looks like.", shapes[1].field
        )
    return shapes[0] if shapes else None


def _schema(given: Mapping[str, object] | str | None, field: str) -> Mapping[str, object] | None:
    if not isinstance(given, str):
        return given
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise bad_request(f"{field} must be a JSON schema.", field)
    return schema


def _one_of(choices: list[str] | None) -> str | None:
    return None if choices is None else "|".join(re.escape(choice) for choice in choices)
