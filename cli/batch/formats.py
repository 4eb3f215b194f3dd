"""Answers and failures as lines: our own records, or those of OpenAI's batch API. And what of them says `finished`.

Every record of a file has the same keys, whether the item was answered or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from cli.batch.items import Item
from cli.errors import REFUSALS

if TYPE_CHECKING:
    from specexec.stats import Completion

Record: TypeAlias = dict[str, object]
Format = Literal["jsonl", "openai-batch", "text"]

_COSTS = ("sweeps", "tokens_per_sweep", "bytes_read", "seconds")


@dataclass(frozen=True)
class Writer:
    """Turns results into records. `model` is the name and revision that every record carries.

    With `dedupe` every record also says whose copy it is, with `facts` what came of the options.
    """

    format: Format
    model: str
    dedupe: bool = False
    facts: Callable[[Item], Record] = lambda _: {}

    def finished(self, item: Item, answer: Completion) -> Record:
        """The record of an answer."""
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.tokens)}
        costs = {
            "sweeps": answer.sweeps,
            "tokens_per_sweep": round(answer.tokens_per_sweep, 3),
            "bytes_read": answer.bytes_read,
            "seconds": round(answer.seconds, 3),
        }
        own: Record = {"seed": answer.seed, **costs, "token_ids": list(answer.tokens)}
        if self.format != "openai-batch":
            body = {"text": answer.text, "finish_reason": answer.finish_reason, "usage": usage}
            return self._record(item, {**body, **own}, None)
        total = {**usage, "total_tokens": sum(usage.values())}
        choice: Record = {"index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
        chat = not isinstance(item.prompt, str)
        said: Record = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        kind = "chat.completion" if chat else "text_completion"
        completion = {"id": f"{item.id}-1", "object": kind, "model": self.model, "choices": [{**choice, **said}]}
        response = {"status_code": 200, "request_id": item.id, "body": {**completion, "usage": total}}
        return self._openai(item, response, None, own)

    def failed(self, item: Item, error: Exception) -> Record:
        """The record of an item that could not be answered."""
        assert isinstance(error, REFUSALS)
        reason: Record = {"code": error.code, "message": error.what}
        if self.format == "openai-batch":
            return self._openai(item, None, reason, dict.fromkeys(("seed", *_COSTS, "token_ids")))
        empty = dict.fromkeys(("text", "finish_reason", "usage", "seed", *_COSTS, "token_ids"))
        return self._record(item, empty, {**reason, "hint": error.hint})

    def _record(self, item: Item, body: Record, error: Record | None) -> Record:
        return {"id": item.id, **self._about(item), **body, "model": self.model, "error": error}

    def _openai(self, item: Item, response: Record | None, error: Record | None, own: Record) -> Record:
        about = {**self._about(item), **own}
        return {"id": item.id, "custom_id": item.id, "response": response, "error": error, "specexec": about}

    def _about(self, item: Item) -> Record:
        about: Record = {"index": item.index, "prompt_sha": item.prompt_sha}
        copied: Record = {"duplicate_of": item.duplicate_of} if self.dedupe else {}
        return {**about, **copied, **self.facts(item)}


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
            str(record["id"]),
            str(about["prompt_sha"]),
            record["error"] is not None,
            len(tokens) if isinstance(tokens, list) else 0,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
