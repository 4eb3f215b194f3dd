"""What a request to a server says, and what the events of its answer mean. Knows no connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from specexec.pieces import Call, Piece
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Cost, Progress
from specexec.tree.tree import TokenTree

Json = dict[str, object]

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
# A stream of sweeps; an answer that the context ends is cut as it is here, and not refused.
WATCHED: Json = {
    "stream": True,
    "watch": True,
    "cut_by_context": True,
    "stream_options": {"include_usage": True},
}
_OTHERWISE = {"grammar", "prompt_logprobs", "logprobs", "logit_bias"}  # what a request says in other words, or not


def sampling_fields(sampling: SamplingParams) -> Json:
    """How tokens are chosen, without what is as it is by default."""
    default = SamplingParams()
    given = {one.name: getattr(sampling, one.name) for one in fields(SamplingParams) if one.name not in _OTHERWISE}
    chosen: Json = {name: value for name, value in given.items() if value != getattr(default, name)}
    if sampling.logit_bias:
        chosen["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return {"max_tokens": sampling.max_tokens, **chosen}


class BurstReader:
    """One answer as its events come. `words` are the tokens that were shown, `echo` what stands before the answer."""

    def __init__(self) -> None:
        self.words: dict[int, str] = {}
        self.progress = Progress(0, 0, 0, 0)
        self.echo = ""
        self.prompt_tokens = 0
        self.ended = False
        self._began = False
        self._piece = Piece()

    def add(self, event: Mapping[str, Any]) -> Burst | None:
        """The sweep that this event completes, if it does; its piece came in the events before."""
        for choice in event["choices"]:
            if not self._began:
                self._began, self.echo = True, choice.get("text", "")
            elif "delta" in choice:
                self._piece += _piece_of(choice["delta"])
            else:
                self._piece += Piece(choice["text"])
        if usage := event.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
        stated = event.get("specexec", {})
        if place := stated.get("progress"):
            self.progress = Progress(place["layer"], place["layers"], place["sweep"], place["bytes_read"])
        return self._burst(stated["burst"]) if "burst" in stated else None

    def _burst(self, stated: Mapping[str, Any]) -> Burst:
        guessed, path = stated["guessed"], stated["path"]
        tree = TokenTree.of(guessed, stated["parents"], stated["reach"], stated["origin"])
        self.words.update(zip(guessed, stated["words"], strict=True))
        self.words.update(zip(stated["tokens"][len(path) :], stated["own"], strict=True))
        self.ended = stated["finish_reason"] is not None
        piece, self._piece = self._piece, Piece()
        return Burst(
            tuple(stated["tokens"]),
            piece.content,
            stated["finish_reason"],
            tree,
            tuple(path),
            stated["seed"],
            Cost(stated["draft_s"], stated["sweep_s"], stated["bytes_read"]),
            limit=stated["limit"],
            piece=piece,
            replaced=stated.get("replaced", 0),
            unread=stated.get("unread", 0),
            kv_dropped=stated.get("kv_dropped", 0),
        )


def stopped(seed: int) -> Burst:
    """What ends an answer that was not waited for."""
    return Burst((), "", "interrupted", TokenTree.empty(), (), seed, Cost())


def _piece_of(delta: Mapping[str, Any]) -> Piece:
    functions = [(call["id"], call["function"]) for call in delta.get("tool_calls", ())]
    calls = tuple(Call(function["name"], function["arguments"], own) for own, function in functions)
    return Piece(delta.get("content") or "", delta.get("reasoning_content", ""), calls)
