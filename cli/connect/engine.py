"""A served model in the place of an engine: answers as bursts, as an engine here would give them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING
from urllib.parse import quote

from cli.connect.conversation import ServedConversation
from cli.connect.models import ServedModel, cards_of
from cli.connect.protocol import CHAT, WATCHED, BurstReader, Json, sampling_fields, stopped
from cli.connect.server import Events
from cli.shared.options import EngineOptions
from cli.shared.thinking import Think
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Progress
from specexec.text.messages import Message

if TYPE_CHECKING:
    from specexec.text.formats.rules import Whole


class ServedEngine:
    """What a conversation and a screen need of an engine. `notes` are what the server left out of the last request."""

    def __init__(self, model: ServedModel, options: EngineOptions, think: Think = "auto") -> None:
        self.model, self.think = model, think
        self.notes = ""
        self._variables, self._control_tokens = dict(options.template_vars), options.allow_control_tokens
        self._reader = BurstReader()
        self._events: Events | None = None

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def names(self) -> list[str]:
        """All models of the server."""
        return [str(card["id"]) for card in cards_of(self.model.server)]

    @property
    def toy(self) -> bool:
        return self.model.meta["toy"] is True

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def drafter_name(self) -> str:
        return str(self.model.meta["drafter"])

    @property
    def lossy(self) -> tuple[str, ...]:
        return self.model.lossy

    @property
    def budget(self) -> object:
        return self.model.meta["budget"]

    @property
    def placement(self) -> str:
        return str(self.model.meta["placement"])

    @property
    def template(self) -> str | None:
        """The chat template as the model brings it."""
        given = self.model.server.asked(f"/props?model={quote(self.model.name)}")["chat_template"]
        return None if given is None else str(given)

    def rendered(self, messages: Items[Message], tools: Items[Message]) -> str:
        """The prompt that messages become."""
        return str(self.model.server.asked("/apply-template", self._asking(messages, tools))["prompt"])

    def count(self, messages: Items[Message], tools: Items[Message]) -> int:
        """Tokens of that prompt."""
        given = self.model.server.asked("/tokenize", self._asking(messages, tools))
        return int(str(given["count"]))

    def decode(self, tokens: Items[int]) -> str:
        """Text of tokens that the last sweeps have shown."""
        return "".join(self._reader.words.get(token, "") for token in tokens)

    def progress(self) -> Progress:
        """Where the server's running sweep is, as it said last."""
        return self._reader.progress

    def stop(self) -> None:
        """End the answer that is being read. Safe in a signal handler."""
        if self._events is not None:
            self._events.stop()

    def conversation(self, system: str | None = None) -> ServedConversation:
        """A dialogue that is kept here."""
        return ServedConversation(self, system)

    def stream(
        self,
        messages: Items[Message],
        sampling: SamplingParams,
        tools: Items[Message] = (),
        whole: Whole | None = None,
        proceed: bool = False,
    ) -> Iterator[Burst]:
        """The answer to messages, or what follows the last of them. Raises NoServer, ServerRefusal."""
        asked = {**self._asking(messages, tools), **sampling_fields(sampling), **WATCHED}
        if whole is not None:
            fields = {"json_schema": whole.schema, "guided_regex": whole.regex, "guided_grammar": whole.grammar}
            asked |= {name: given for name, given in fields.items() if given is not None}
        if proceed:
            asked |= {"continue_final_message": True, "add_generation_prompt": False}
        events = self._events = self.model.server.events(CHAT, asked)
        reader, seed = BurstReader(), sampling.seed or 0
        reader.words, self._reader = self._reader.words, reader
        for event in events:
            self.notes = events.notes
            if (burst := reader.add(event)) is not None:
                seed = burst.seed
                yield burst
        if not reader.ended:
            yield stopped(seed)

    def _asking(self, messages: Items[Message], tools: Items[Message]) -> Json:
        asked: Json = {"model": self.model.name, "messages": messages}
        if tools:
            asked["tools"] = tools
        if self._variables:
            asked["chat_template_kwargs"] = self._variables
        if self._control_tokens:
            asked["allow_control_tokens"] = True
        if self.think != "auto":
            asked["reasoning_effort"] = self.think
        return asked
