"""/v1/chat/completions and /v1/completions: a body becomes a request, its answer OpenAI's events."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from functools import partial

from cli.openai.answers import ApiReply, picture, place
from cli.openai.choice import NOTHING, Choice, News
from cli.openai.errors import ApiError
from cli.openai.logprobs import Json
from cli.openai.parse import HttpRequest, read_chat, read_completion
from cli.openai.reply import Exchange, Prompted, Standing, StreamEvent


def chat(body: object, served: Items[str]) -> Exchange:
    """A chat completion. Raises ApiError."""
    asked = read_chat(body, served)
    return Exchange(asked, partial(CompletionReply, asked))


def completion(body: object, served: Items[str]) -> Exchange:
    """A completion of raw text. Raises ApiError."""
    asked = read_completion(body, served)
    return Exchange(asked, partial(CompletionReply, asked))


class CompletionReply:
    """The answer to either; those who `watch` are shown every sweep and its tree."""

    def __init__(self, asked: HttpRequest, prompted: Prompted) -> None:
        self._asked = asked
        self._decode = prompted.decode
        self._shapes = ApiReply(asked.chat, prompted.model, prompted.tokens, lossy=prompted.lossy)

    def whole(self, choices: list[Choice]) -> Json:
        return self._shapes.whole(choices)

    def opening(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        return (StreamEvent(self._shapes.opening(choice)) for choice in choices)

    def more(self, choice: Choice, news: News) -> Iterator[StreamEvent]:
        if news:
            yield StreamEvent(self._shapes.more(choice, news))
        if self._asked.watch and news.burst is not None:
            yield StreamEvent(self._shapes.watched(index=choice.index, burst=picture(news.burst, self._decode)))
        if choice.finish_reason:
            yield StreamEvent(self._shapes.ending(choice))

    def closing(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        if self._asked.include_usage:
            yield StreamEvent(self._shapes.used(choices))
        yield StreamEvent("[DONE]")

    def failing(self, error: ApiError) -> Iterator[StreamEvent]:
        yield StreamEvent(error.body)

    def alive(self, standing: Standing, unfinished: list[Choice], comments: bool) -> StreamEvent:
        if self._asked.watch:
            return StreamEvent(self._shapes.watched(progress=place(standing.progress), ahead=standing.ahead))
        if comments or not unfinished:
            return StreamEvent(comment=standing.words)
        return StreamEvent(self._shapes.more(unfinished[0], NOTHING))
