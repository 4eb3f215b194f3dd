"""From an item to requests for the engine, and from finished texts to its answer. Needs the tokenizer, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cli.batch.input.items import Item, ItemText
from cli.batch.output.answers import ItemAnswer
from cli.batch.refusals import BadRequest
from cli.openai.choice import Choice
from cli.openai.errors import ApiError
from cli.openai.logprobs import LogprobReader
from specexec.engine.request_types import Request
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Completion, Cost
from specexec.text.template_options import Wishes
from specexec.tree.tree import TokenTree

if TYPE_CHECKING:
    from specexec.text.formats import Format
    from specexec.text.formats.thinking import Level
    from specexec.text.tokenizer import Encoding


@dataclass(frozen=True)
class TemplateSettings:
    """What the chat template gets for an item, how its model then writes, and what of it had no effect."""

    wishes: Wishes
    form: Format
    notes: tuple[str, ...] = ()


@dataclass
class Preparation:
    """`thinking` is for every item that does not say itself how much to think, `stop` for those that name no stops."""

    encoding: Encoding
    thinking: Level | None = None
    stop: tuple[str, ...] = ()
    _left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def requests(self, item: Item, run: SamplingParams) -> list[Request]:
        """One for each text. Raises what is wrong with the item."""
        return [self._request(item, text) for text in item.texts(run)]

    def answer(self, item: Item, run: SamplingParams, completions: Mapping[int, Completion]) -> ItemAnswer:
        """The texts of an item, read; `completions` are those that there are, by their place among them."""
        settings = self._settings(item) if item.chat and self.encoding.template is not None else None
        texts = item.texts(run)
        choices = tuple(self._choice(at, item, settings, texts[at], one) for at, one in completions.items())
        notes = (*(settings.notes if settings else ()), *self._left_out.pop(item.id, ()))
        return ItemAnswer(tuple(completions.values()), choices, notes)

    def _request(self, item: Item, text: ItemText) -> Request:
        request = Request(0, text.prompt, text.sampling, wishes=item.template)
        asked = item.asked
        bounded = asked is not None and bool(asked.shape or asked.tools)
        if item.chat and (bounded or self._level(item)):
            settings = self._settings(item)
            grammar = self._grammar(item, text, settings) if bounded else None
            return replace(request, wishes=settings.wishes, grammar=grammar)
        if asked is not None and asked.shape is not None:
            from cli.openai.prepare import grammar_of

            return replace(request, grammar=grammar_of(asked.shape))
        return request

    def _level(self, item: Item) -> Level | None:
        return (item.asked.thinking if item.asked is not None else None) or self.thinking

    def _settings(self, item: Item) -> TemplateSettings:
        from cli.openai.prepare import form_of
        from specexec.text.formats import format_of

        wishes, level, asked = item.template or Wishes(), self._level(item), item.asked

        def found(wishes: Wishes) -> Format:
            return format_of(self.encoding, wishes) if asked is None else form_of(self.encoding, wishes, asked)

        form, notes = found(wishes), asked.notes if asked is not None else ()
        if level is None:
            return TemplateSettings(wishes, form, notes)
        thinking = form.thinking(level)
        if not thinking.variables:
            notes = (*notes, f"thinking {level!r} has no effect: {thinking.effect}")
        wishes = replace(wishes, variables={**thinking.variables, **wishes.variables})
        return TemplateSettings(wishes, found(wishes), notes)

    def _grammar(self, item: Item, text: ItemText, settings: TemplateSettings) -> str | None:
        """What the answer must look like, from the end of its thought on."""
        from cli.openai.prepare import bound_of

        assert item.asked is not None
        try:
            bound = bound_of(settings.form, self.encoding.encode(text.prompt, settings.wishes), item.asked)
        except ApiError as refusal:
            raise BadRequest(item.id, refusal) from None
        if bound is None:
            return None
        self._left_out[item.id] = bound.notes
        return bound.text

    def _choice(
        self, index: int, item: Item, settings: TemplateSettings | None, text: ItemText, completion: Completion
    ) -> Choice:
        echo = item.asked is not None and item.asked.echo
        marked = settings is not None and (settings.form.thoughts or settings.form.calls)
        reader = logprob_reader = None
        tokens: list[int] = []
        if marked or echo or text.sampling.logprobs is not None:
            tokens = self.encoding.encode(text.prompt, settings.wishes if settings else None)
        if settings is not None and marked:
            stop = self.stop if text.sampling.stop is None else text.sampling.stop
            reader = settings.form.reader(tokens, stop=stop)
        if text.sampling.logprobs is not None:
            logprob_reader = LogprobReader(self.encoding.piece, tokens, echo)
        said = ""
        if echo:
            said = text.prompt if isinstance(text.prompt, str) else self.encoding.decode(tokens)
        choice = Choice(index, said, reader, logprob_reader)
        choice.add(
            Burst(
                completion.tokens,
                completion.text,
                completion.finish_reason,
                TokenTree.empty(),
                (),
                completion.seed,
                Cost(),
                completion.logprobs,
                completion.prompt_logprobs,
                limit=completion.limit,
            )
        )
        choice.drafted, choice.accepted, choice.sweeps = completion.nodes, completion.accepted, completion.sweeps
        return choice
