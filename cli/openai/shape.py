"""The shape of a whole answer (schema, grammar, JSON), from the fields of OpenAI's, vLLM's and llama.cpp's clients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cli.openai.errors import bad_request
from cli.openai.schema import RequestBody, StructuredOutputs
from specexec.errors import BadGrammar
from specexec.sampling.lark import lark
from specexec.text.messages import json_object


@dataclass(frozen=True)
class AnswerShape:
    """JSON that a schema describes, text that a regex matches from end to end, or text of a grammar in Lark.

    `field` is where it was asked for.
    """

    field: str
    schema: Mapping[str, object] | None = None
    regex: str | None = None
    grammar: str | None = None


def read_shape(request: RequestBody) -> AnswerShape | None:
    """What the answer must look like; None for plain text. Raises ApiError."""
    given, outputs = request.response_format, request.structured_outputs or StructuredOutputs()
    wanted = [
        AnswerShape("response_format", given.schema_to_follow if given else None),
        AnswerShape("guided_json", _schema(request.guided_json, "guided_json")),
        AnswerShape("json_schema", request.json_schema),
        AnswerShape("guided_regex", regex=request.guided_regex),
        AnswerShape("guided_choice", regex=_one_of(request.guided_choice)),
        AnswerShape("grammar", grammar=_lark(request.grammar or None, "grammar")),
        AnswerShape("guided_grammar", grammar=_lark(request.guided_grammar, "guided_grammar")),
        AnswerShape("structured_outputs", grammar=_lark(outputs.grammar, "structured_outputs")),
        AnswerShape("structured_outputs", _schema(outputs.json_, "structured_outputs")),
        AnswerShape("structured_outputs", {"type": "object"} if outputs.json_object else None),
        AnswerShape("structured_outputs", regex=outputs.regex),
        AnswerShape("structured_outputs", regex=_one_of(outputs.choice)),
    ]
    shapes = [shape for shape in wanted if (shape.schema, shape.regex, shape.grammar) != (None, None, None)]
    if len(shapes) > 1:
        raise bad_request(
            f"{shapes[0].field} and {shapes[1].field} both say what an answer looks like.", shapes[1].field
        )
    return shapes[0] if shapes else None


def _schema(given: Mapping[str, object] | str | None, field: str) -> Mapping[str, object] | None:
    if not isinstance(given, str):
        return given
    schema = json_object(given)
    if schema is None:
        raise bad_request(f"{field} must be a JSON schema.", field)
    return schema


def _lark(given: str | None, field: str) -> str | None:
    try:
        return None if given is None else lark(given)
    except BadGrammar as problem:
        raise bad_request(problem.what, field, problem.code) from None


def _one_of(choices: list[str] | None) -> str | None:
    return None if choices is None else "|".join(re.escape(choice) for choice in choices)
