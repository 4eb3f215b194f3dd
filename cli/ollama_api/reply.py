"""An answer in Ollama's shapes: lines of JSON, or one object with all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

from cli.openai.choice import Choice, News
from cli.openai.errors import ApiError
from cli.openai.logprobs import Json, PieceLogprob, for_chat
from cli.openai.reply import Prompted, Standing, StreamEvent
from specexec.text.formats import Piece

_NS = 1e9


class OllamaReply:
    """The answer to /api/chat, or else to /api/generate, which has no message around its words."""

    def __init__(self, chat: bool, prompted: Prompted) -> None:
        self._chat = chat
        self._prompted = prompted

    def whole(self, choices: list[Choice]) -> Json:
        (choice,) = choices
        return {**self._line(choice.piece, choice.logprobs), **self._ending(choice)}

    def opening(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        return iter(())

    def more(self, choice: Choice, news: News) -> Iterator[StreamEvent]:
        if news:
            yield StreamEvent({**self._line(news.piece, news.logprobs), "done": False})

    def closing(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        (choice,) = choices
        yield StreamEvent({**self._line(Piece(), []), **self._ending(choice)})

    def failing(self, error: ApiError) -> Iterator[StreamEvent]:
        yield StreamEvent(error_body(error))

    def alive(self, standing: Standing, unfinished: list[Choice], comments: bool) -> StreamEvent:
        return StreamEvent({**self._line(Piece(), []), "done": False})  # lines of JSON have no comments

    def _line(self, piece: Piece, logprobs: list[PieceLogprob]) -> Json:
        head: Json = {"model": self._prompted.model, "created_at": datetime.now(UTC).isoformat()}
        likely = for_chat(logprobs)["content"] if logprobs else None
        words: Json = {"thinking": piece.reasoning} if piece.reasoning else {}
        if self._chat:
            message: Json = {"role": "assistant", "content": piece.content, **words}
            if piece.calls:
                message["tool_calls"] = [
                    {"id": call.id, "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                    for call in piece.calls
                ]
            words = {"message": message}
        else:
            words["response"] = piece.content
        return {**head, **words, **({"logprobs": likely} if likely else {})}

    def _ending(self, choice: Choice) -> Json:
        """Why it ended, and nanoseconds: the first sweep, which reads the prompt, counts as time of the prompt."""
        first_s = (choice.first_s or choice.began_s) - choice.began_s
        whole_s = choice.last_s - choice.began_s
        return {
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            "total_duration": int(whole_s * _NS),
            "load_duration": 0,
            "prompt_eval_count": self._prompted.tokens,
            "prompt_eval_duration": int(first_s * _NS),
            "eval_count": choice.tokens,
            "eval_duration": int((whole_s - first_s) * _NS),
        }


def error_body(refusal: ApiError) -> Json:
    """A refusal as Ollama's clients read it."""
    return {"error": refusal.message}
