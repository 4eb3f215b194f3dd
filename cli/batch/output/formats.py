"""Answers and failures as lines: our own records, or those of OpenAI's batch API, and which of them are finished.

Every record of a run has the same keys, whether the item was answered or not; only what an item alone has asked for
(`choices`, `logprobs`) or what must be reported of it (`notes`) is its own.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from cli.batch.input.items import Item
from cli.batch.refusals import BadRequest
from cli.openai.errors import api_error
from cli.shared.errors import REFUSALS
from cli.shared.quantities import in_json

if TYPE_CHECKING:
    from cli.batch.output.answers import ItemAnswer
    from cli.openai.choice import Choice
    from specexec.stats import Completion

Record: TypeAlias = dict[str, object]
Format = Literal["jsonl", "openai-batch", "text"]

_TEXT = ("text", "reasoning", "tool_calls", "finish_reason", "limit")
_OWN = ("seed", "sweeps", "tokens_per_sweep", "bytes_read", "seconds", "token_ids")


@dataclass(frozen=True)
class RecordWriter:
    """Turns results into records. `model` is the name and revision that every record carries.

    With `dedupe` every record also says whose copy it is, with `facts` what came of the options, and with `lossy` what
    changed the texts.
    """

    format: Format
    model: str
    dedupe: bool = False
    lossy: tuple[str, ...] = ()
    facts: Callable[[Item], Record] = lambda _: {}
    created: int = field(default_factory=lambda: int(time.time()))

    def finished(self, item: Item, answer: ItemAnswer) -> Record:
        """The record of an answer."""
        own = {
            **_own(answer.completions),
            **self._lossy(answer),
            **({"notes": list(answer.notes)} if answer.notes else {}),
        }
        if self.format == "openai-batch":
            if any(choice.finish_reason == "interrupted" for choice in answer.choices):
                stopped: Record = {"code": "interrupted", "message": "the run was stopped before the answer ended."}
                return self._openai(item, None, stopped, {**own, "text": answer.text})
            return self._openai(item, self._response(item, 200, self._body(item, answer)), None, own)
        choices = [_text_record(choice) for choice in answer.choices]
        written = sum(len(one.tokens) for one in answer.completions)
        body = {**choices[0], "usage": {"prompt_tokens": _prompt_tokens(item, answer), "completion_tokens": written}}
        if item.count > 1:
            each = zip(choices, answer.completions, strict=True)
            body["choices"] = [
                {**choice, "seed": in_json(one.seed), "token_ids": list(one.tokens)} for choice, one in each
            ]
        return self._record(item, {**body, **own}, None)

    def _lossy(self, answer: ItemAnswer) -> Record:
        steps = [replaced for one in answer.completions for replaced in one.replaced]
        return (
            {
                "lossy": {
                    "asked": self.lossy,
                    "steps_replaced": len(steps),
                    "sweeps_saved": sum(steps),
                    "unread": sum(one.unread for one in answer.completions),
                    "kv_dropped": sum(one.kv_dropped for one in answer.completions),
                }
            }
            if self.lossy
            else {}
        )

    def failed(self, item: Item, error: Exception) -> Record:
        """The record of an item that could not be answered."""
        assert isinstance(error, REFUSALS)
        reason: Record = {"code": error.code, "message": error.what}
        if self.format == "openai-batch":
            nothing = dict.fromkeys(_OWN)
            if item.asked is None and not isinstance(error, BadRequest):
                return self._openai(item, None, reason, nothing)
            refusal = error.refusal if isinstance(error, BadRequest) else api_error(error)
            return self._openai(item, self._response(item, refusal.status, refusal.body), reason, nothing)
        empty = dict.fromkeys((*_TEXT, "usage", *_OWN))
        return self._record(item, empty, {**reason, "hint": error.hint})

    def _record(self, item: Item, body: Record, error: Record | None) -> Record:
        return {"id": item.id, **self._about(item), **body, "model": self.model, "error": error}

    def _openai(self, item: Item, response: Record | None, error: Record | None, own: Record) -> Record:
        about = {**self._about(item), **own}
        name = f"batch_req_{_hex(item, 'request')}"
        return {"id": name, "custom_id": item.id, "response": response, "error": error, "specexec": about}

    def _response(self, item: Item, status: int, body: Record) -> Record:
        return {"status_code": status, "request_id": f"req_{_hex(item, 'response')}", "body": body}

    def _body(self, item: Item, answer: ItemAnswer) -> Record:
        from cli.openai.answers import ApiReply

        reply = ApiReply(
            item.chat, self.model, _prompt_tokens(item, answer), _hex(item, "body"), self.created, self.lossy
        )
        whole = reply.whole(list(answer.choices))
        return {name: value for name, value in whole.items() if name != "timings"}

    def _about(self, item: Item) -> Record:
        about: Record = {"index": item.index, "prompt_sha": item.prompt_sha}
        copied: Record = {"duplicate_of": item.duplicate_of} if self.dedupe else {}
        return {**about, **copied, **self.facts(item)}


def _text_record(choice: Choice) -> Record:
    """One text in our own words."""
    piece = choice.piece
    calls = [{"id": one.id, "name": one.name, "arguments": one.arguments} for one in piece.calls]
    likely = {} if choice.logprob_reader is None else {"logprobs": [vars(one) for one in choice.logprobs]}
    return {
        "text": choice.echo + piece.content,
        "reasoning": piece.reasoning or None,
        "tool_calls": calls or None,
        "finish_reason": choice.finish_reason,
        "limit": choice.limit,
        **likely,
    }


def _own(completions: tuple[Completion, ...]) -> Record:
    first, tokens, sweeps = (
        completions[0],
        sum(len(one.tokens) for one in completions),
        sum(one.sweeps for one in completions),
    )
    return {
        "seed": in_json(first.seed),
        "sweeps": sweeps,
        "tokens_per_sweep": round(tokens / sweeps if sweeps else 0.0, 3),
        "bytes_read": sum(one.bytes_read for one in completions),
        "seconds": round(max(one.seconds for one in completions), 3),
        "token_ids": list(first.tokens),
    }


def _prompt_tokens(item: Item, answer: ItemAnswer) -> int:
    """A prompt counts once, however many choices were written for it."""
    n = 1 if item.asked is None else item.asked.n
    return sum(one.prompt_tokens for one in answer.completions[::n])


def _hex(item: Item, kind: str) -> str:
    """A name of its own for each record, the same whenever the item is answered."""
    return hashlib.sha256(f"{kind} {item.id} {item.prompt_sha}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Done:
    """What an old record says: whose it is, of which prompt, and whether it is an answer."""

    id: str
    prompt_sha: str
    failed: bool
    tokens: int


def line_of(record: Mapping[str, object]) -> bytes:
    """One line of JSON, newline included."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def done_of(line: bytes) -> Done | None:
    """What a line of an output file says; None if it is not a whole record of ours."""
    try:
        record = json.loads(line.decode())
        about = record.get("specexec", record)
        tokens = about["token_ids"]
        return Done(
            str(record["custom_id"] if "specexec" in record else record["id"]),
            str(about["prompt_sha"]),
            record["error"] is not None,
            len(tokens) if isinstance(tokens, list) else 0,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
