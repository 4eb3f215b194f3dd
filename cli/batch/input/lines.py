"""One line of a JSONL file becomes one Item, whatever the line holds. Knows no file.

Three kinds of line: our own (a prompt, messages or text, wishes beside it), training data (datasets.py), and those of
OpenAI's batch API, known by custom_id or url beside a body.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

from cli.batch.input.datasets import question_of
from cli.batch.input.form import Form
from cli.batch.input.items import Item, Json, is_text
from cli.batch.input.json_line import read_object
from cli.batch.input.requests import item_of_body, wishes_in
from cli.batch.refusals import BadRequest
from cli.openai.errors import bad_request
from cli.shared.errors import BadJsonl
from specexec.errors import SpecexecError

FIELDS = ("prompt", "messages", "text")
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"


def item_of_line(line: bytes, place: str, form: Form) -> Item:
    """The item of one line. Never raises: what is wrong with the line becomes the item's problem."""
    name = place
    try:
        record = read_object(line, place)
        name = _name(record, place)
        if "body" in record and ("custom_id" in record or "url" in record):
            return _request(name, record, place, form)
        return _own(name, record, place, form)
    except SpecexecError as problem:
        return Item(name, problem=problem)


def _name(record: Mapping[str, Json], place: str) -> str:
    """What the line calls itself; its place where it has no name."""
    given = record.get("custom_id", record.get("id"))
    if given is None:
        return place
    if isinstance(given, bool) or not isinstance(given, (int, float, str)) or not is_text(str(given)):
        raise BadJsonl(f"{place}: an id is text or a number.")
    if isinstance(given, float) and not math.isfinite(given):
        raise BadJsonl(f"{place}: an id is text or a finite number.")
    return str(given)


def _request(name: str, record: Mapping[str, Json], place: str, form: Form) -> Item:
    """A line of OpenAI's batch API."""
    body = record["body"]
    if not isinstance(body, dict):
        raise BadRequest(place, bad_request("body must be a JSON object.", "body"))
    method, url = record.get("method", "POST"), record.get("url", _CHAT if "messages" in body else _COMPLETION)
    if method != "POST":
        raise BadRequest(place, bad_request(f"method is {_shown(method)}; only POST is answered.", "method"))
    if url not in (_CHAT, _COMPLETION):
        reason = f"url {_shown(url)} is not answered; {_CHAT} and {_COMPLETION} are."
        raise BadRequest(place, bad_request(reason, "url", "unsupported_url"))
    chat = url == _CHAT
    key = "messages" if chat else "prompt"
    if key not in body:
        raise BadRequest(place, bad_request(f"{key} is missing, which {url} needs.", key))
    return item_of_body(name, {**body, key: _framed(body, key, place, form, chat=chat)}, place, chat=chat)


def _framed(body: Mapping[str, Json], key: str, place: str, form: Form, *, chat: bool) -> object:
    """The prompt of a body with the run's own template and system message around it."""
    value, where = body[key], f"{place}: field {key!r}"
    if not chat:  # /v1/completions continues the text as it is
        return replace(form, system=None, chat=False).prompt(value, where, body) if form.template else value
    if form.template is None and not isinstance(value, list):
        return value  # it will be refused in the words of the API
    return form.prompt(value, where, body)


def _own(name: str, record: Mapping[str, Json], place: str, form: Form) -> Item:
    """A line of our own kind, or of training data."""
    question = None if form.field or form.template else question_of(record, place)
    if question is not None:
        value, where = question.asked, place
    else:
        key = _key(record, place, form)
        value, where = (None, place) if key is None else (record[key], f"{place}: field {key!r}")
        if key == "messages" and form.template is None and not isinstance(value, list):
            raise BadJsonl(f"{where}: a list of messages, each with role and content.")
    prompt = _with_line(form, record, place).prompt(value, where, record)
    chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    body = {"messages" if chat else "prompt": prompt, **wishes_in(record, place)}
    item = item_of_body(name, body, place, chat=chat)
    return replace(item, answered=question is not None and question.answered)


def _with_line(form: Form, record: Mapping[str, Json], place: str) -> Form:
    """The form with the system message that a line brings. To a template all fields of a line are its data."""
    system = record.get("system")
    if system in (None, "") or form.template is not None:
        return form
    if not isinstance(system, str):
        raise BadJsonl(f"{place}: field 'system' is text.")
    if not form.chat:
        raise BadJsonl(f"{place}: field 'system' needs the chat template.", hint="leave out --raw.")
    return replace(form, system=system)


def _key(record: Mapping[str, Json], place: str, form: Form) -> str | None:
    """Which field holds the prompt; None if only the template knows."""
    wanted = (form.field,) if form.field else FIELDS
    there = [key for key in wanted if key in record]
    if form.template is not None:
        return there[0] if there else None
    if "prompt" in there and "messages" in there:
        raise BadJsonl(f"{place}: both 'prompt' and 'messages' are there.", hint="say which with --field.")
    if there:
        return there[0]
    missing = " or ".join(map(repr, wanted))
    raise BadJsonl(f"{place}: no field {missing}.", hint="name it with --field.")


def _shown(value: Json) -> str:
    return json.dumps(value)[:60]
