"""A request body of a line, read as the server reads it; fields that cannot be honoured are refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING

from cli.batch.input.items import Item, Json, is_text
from cli.batch.refusals import BadRequest
from cli.openai.errors import ApiError, bad_request
from cli.shared.errors import BadJsonl
from specexec.errors import BadText
from specexec.sampling.params import SamplingParams

if TYPE_CHECKING:
    from cli.openai.parse import HttpRequest

# What other programs call a wish, and what it is called here; a dropped one would be noticed too late.
_FOREIGN = {"max_new_tokens": "max_tokens", "stop_sequences": "stop", "do_sample": "temperature", "num_beams": ""}
FILL = 2**31  # tokens: whatever the context holds
# What bodies hold that is not about the text: the command line names the model, and no client reads a stream.
_NOT_HERE = ("model", "stream_options")
_LIVE = ("stream", "watch")


def item_of_body(name: str, body: Mapping[str, object], place: str, *, chat: bool) -> Item:
    """The item of a chat's or a completion's body. Raises BadRequest, BadText."""
    from cli.openai.parse import read_chat, read_completion  # pydantic: not for those who only want --help

    given = {key: value for key, value in body.items() if key not in _NOT_HERE}
    if not is_text(json.dumps(given, ensure_ascii=False)):
        raise BadText(f"{place}: half a character (a lone surrogate) is not text.")
    try:
        if live := next((key for key in _LIVE if given.get(key)), None):
            raise bad_request(f"{live} is not supported in batch work.", live, "unsupported_parameter")
        asked = (read_chat if chat else read_completion)(given, [])
        if asked.suffix is not None:
            raise bad_request("suffix is not supported in batch work.", "suffix", "unsupported_parameter")
        if asked.ignored:
            raise bad_request(f"{asked.ignored[0]} is not supported.", asked.ignored[0], "unsupported_parameter")
    except ApiError as refusal:
        raise BadRequest(place, refusal) from None
    return Item(name, asked.prompts[0], _wishes(asked), asked=asked)


def wishes_in(record: Mapping[str, Json], place: str) -> dict[str, Json]:
    """The fields of a line beside its prompt that wish for something; all others are the line's own data."""
    wishes: dict[str, Json] = {name: value for name, value in record.items() if value is not None and name in _known()}
    if foreign := next((name for name in _FOREIGN if record.get(name) is not None), None):
        hint = f"it is called {_FOREIGN[foreign]!r} here." if _FOREIGN[foreign] else None
        raise BadJsonl(f"{place}: field {foreign!r} is not known.", hint=hint)
    return wishes


@cache
def _known() -> frozenset[str]:
    from pydantic import AliasChoices

    from cli.openai.parse import UNSUPPORTED
    from cli.openai.schema import ChatRequest, CompletionRequest

    names = {one.name for one in fields(SamplingParams)} | set(UNSUPPORTED)
    for name, field in (*ChatRequest.model_fields.items(), *CompletionRequest.model_fields.items()):
        also = field.validation_alias
        names |= {name, *(map(str, also.choices) if isinstance(also, AliasChoices) else ())}
    return frozenset(names - {"messages", "prompt", *_NOT_HERE})


def _wishes(asked: HttpRequest) -> dict[str, Json]:
    """The sampling that the body chooses, by the names of SamplingParams."""
    own = {one.name for one in fields(SamplingParams)} & asked.chosen - {"grammar"}
    wishes = {name: getattr(asked.sampling, name) for name in sorted(own)}
    if asked.chosen & {"max_tokens", "max_completion_tokens"}:
        wishes["max_tokens"] = asked.max_tokens or FILL
    if asked.sampling.prompt_logprobs:
        wishes["prompt_logprobs"] = True
    return {name: value for name, value in wishes.items() if value is not None}
