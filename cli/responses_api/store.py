"""Responses that were stored, so that a next one can go on from them. In memory alone, the oldest leave first."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from cli.openai.errors import ApiError
from cli.openai.logprobs import Json
from cli.openai.parse import Message
from cli.responses_api.schema import Item

MOST_RESPONSES = 1000
MOST_LETTERS = 64_000_000  # of all responses and conversations as JSON


@dataclass(frozen=True)
class StoredResponse:
    """A response as it went out, and its whole conversation, the answer included."""

    body: Json
    conversation: list[Message]


class ResponseStore:
    """Responses by id. Any thread may use it."""

    def __init__(self, most: int = MOST_RESPONSES, letters: int = MOST_LETTERS) -> None:
        self._most, self._most_letters = most, letters
        self._letters = 0
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._lock = Lock()

    def put(self, response: StoredResponse) -> None:
        """Keep a response, and forget the oldest that there is no room for beside it."""
        letters = len(json.dumps([response.body, response.conversation], ensure_ascii=False))
        with self._lock:
            self._stored[str(response.body["id"])] = response, letters
            self._letters += letters
            while self._stored and (len(self._stored) > self._most or self._letters > self._most_letters):
                _, (_, freed) = self._stored.popitem(last=False)
                self._letters -= freed

    def get(self, name: str, param: str | None = None) -> StoredResponse:
        """A response by its id. Raises ApiError."""
        with self._lock:
            if name not in self._stored:
                raise _unknown(name, param)
            self._stored.move_to_end(name)
            return self._stored[name][0]

    def delete(self, name: str) -> None:
        """Forget a response. Raises ApiError."""
        with self._lock:
            if name not in self._stored:
                raise _unknown(name, None)
            self._letters -= self._stored.pop(name)[1]

    def item(self, name: str) -> Item | None:
        """An item of the output of any response."""
        with self._lock:
            outputs = [response.body["output"] for response, _ in self._stored.values()]
        items = (item for output in outputs if isinstance(output, list) for item in output)
        return next((item for item in items if item["id"] == name), None)


def _unknown(name: str, param: str | None) -> ApiError:
    what = f"no response {name!r} is stored here (any more); send the whole conversation as input."
    return ApiError(404, "response_not_found", what, param=param)
