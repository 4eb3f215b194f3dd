"""llama.cpp's /infill as data: a body becomes a completion with a suffix, its answer llama.cpp's objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial

from cli.openai.choice import NOTHING, Choice, News
from cli.openai.errors import ApiError, bad_request
from cli.openai.logprobs import Json
from cli.openai.parse import read_completion, read_translated
from cli.openai.reply import Exchange, Prompted, Standing, StreamEvent
from cli.openai.schema import FILL
from specexec.text.infill import OtherText

_OURS = ("input_prefix", "input_suffix", "input_extra", "prompt")
_ALONE: dict[str, tuple[object, ...]] = {"n": (None, 1), "echo": (None, False)}
_ENDS = {"stop": "eos", "length": "limit"}


def infill(body: object, served: Items[str]) -> Exchange:
    """What stands between two texts; `prompt` is its beginning, `input_extra` are other texts. Raises ApiError."""
    given: Mapping[str, object] = body if isinstance(body, Mapping) else {}
    before, after, begun = (given.get(name) or "" for name in ("input_prefix", "input_suffix", "prompt"))
    if not (isinstance(before, str) and isinstance(after, str) and isinstance(begun, str)):
        raise bad_request("input_prefix, input_suffix and prompt are texts.", "input_prefix")
    for name, harmless in _ALONE.items():
        if given.get(name) not in harmless:
            raise bad_request(f"{name} is not supported here.", name, "unsupported_parameter")
    rest = {"n_predict": FILL, **{name: value for name, value in given.items() if name not in _OURS}}
    names = {"prompt": "input_prefix", "suffix": "input_suffix", "max_tokens": "n_predict"}
    asked = {**rest, "prompt": before + begun, "suffix": after}
    request = read_translated(read_completion, asked, served, names, ())
    return Exchange(replace(request, others=_others(given.get("input_extra"))), partial(InfillReply))


def _others(given: object) -> tuple[OtherText, ...]:
    if not isinstance(given, list | None):
        raise bad_request("input_extra is a list of objects with a text and a filename.", "input_extra")
    others = []
    for at, one in enumerate(given or []):
        name, text = (one.get("filename", "tmp"), one.get("text")) if isinstance(one, Mapping) else ("", None)
        if not (isinstance(name, str) and isinstance(text, str)):
            raise bad_request(f"input_extra.{at}: a text and a filename are needed.", f"input_extra.{at}")
        others.append(OtherText(name, text))
    return tuple(others)


class InfillReply:
    """The answer, whole or in pieces; the last piece has no text and says how it ended."""

    def __init__(self, prompted: Prompted) -> None:
        self._prompted = prompted

    def whole(self, choices: list[Choice]) -> Json:
        return self._ended(choices[0], choices[0].piece.content)

    def opening(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        return iter(())

    def more(self, choice: Choice, news: News) -> Iterator[StreamEvent]:
        if news:
            yield StreamEvent({"index": choice.index, "content": news.piece.content, "stop": False})

    def closing(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        yield StreamEvent(self._ended(choices[0], ""))

    def failing(self, error: ApiError) -> Iterator[StreamEvent]:
        yield StreamEvent(error.body)

    def alive(self, standing: Standing, unfinished: list[Choice], comments: bool) -> StreamEvent:
        if comments or not unfinished:
            return StreamEvent(comment=standing.words)
        return StreamEvent({"index": 0, "content": NOTHING.piece.content, "stop": False})

    def _ended(self, choice: Choice, content: str) -> Json:
        ended = "word" if choice.stop_text else _ENDS.get(choice.finish_reason or "", "none")
        return {
            "index": choice.index,
            "content": content,
            "stop": True,
            "stop_type": ended,
            "stopping_word": choice.stop_text or "",
            "model": self._prompted.model,
            "tokens_predicted": choice.tokens,
            "tokens_evaluated": self._prompted.tokens,
            "truncated": False,
        }
