"""A checked request becomes what the engine needs: prompt tokens, a grammar, a reader of the answer.

All long work on a request is here (templates, tokens, grammars). It may run in any thread, several at once, and holds
no lock: one request never waits for the preparation of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from cli.openai.errors import ApiError, api_error, bad_request
from cli.openai.parse import HttpRequest, Message, Prompt
from cli.openai.shape import AnswerShape
from specexec.errors import BadGrammar, BadMessages, BadText, ContextLengthExceeded, EmptyPrompt
from specexec.text.formats import Format, Reader, format_of
from specexec.text.formats.rules import Bound, Whole
from specexec.text.messages import text_in
from specexec.text.template_options import Wishes

if TYPE_CHECKING:
    from specexec.engine.engine import Engine
    from specexec.sampling.grammar import Grammar
    from specexec.text.tokenizer import Encoding


@dataclass(frozen=True)
class PromptText:
    """One prompt. `echo` is its text if that was asked for; `form` splits its answers into text, thoughts and calls.

    `images` are those whose rows are among its tokens, which are known as long as these are held.
    """

    tokens: list[int]
    images: tuple[object, ...] = ()
    echo: str = ""
    grammar: Grammar | None = None
    form: Format | None = None

    def reader(self, stop: Items[str]) -> Reader | None:
        """Follows one answer; None where answers are plain text."""
        return None if self.form is None else self.form.reader(self.tokens, stop=stop)


@dataclass(frozen=True)
class Prepared:
    """The texts of a request, and one sentence for each thing in it that was left out."""

    texts: list[PromptText]
    notes: tuple[str, ...] = ()


def prepare(engine: Engine, asked: HttpRequest) -> Prepared:
    """Everything that comes before the first sweep. Raises ApiError, BadMessages, BadText."""
    for name, tokens in asked.sampling.token_ids.items():
        check_tokens(engine, tokens, name)
    if asked.chat:
        return _chat(engine, asked)
    texts = [_raw(engine, asked, prompt) for prompt in asked.prompts]
    if asked.shape is not None:
        grammar = _read(engine, grammar_of(asked.shape), asked.shape.field)
        texts = [replace(text, grammar=grammar) for text in texts]
    return Prepared(texts, asked.notes)


def encode(
    engine: Engine, prompt: Prompt, wishes: Wishes | None = None, special: bool = True, most: int | None = None
) -> list[int]:
    """Token ids; `special` adds those that a raw text begins or ends with.

    Text that must come to more than `most` tokens is refused before they are made. Raises ApiError, BadMessages,
    BadText.
    """
    encoding = engine.encoding
    if isinstance(prompt, str):
        _check_length(encoding, prompt, most)
        return encoding.encode(prompt, wishes) if special else encoding.encode_part(prompt, wishes)
    messages: list[Message] = [item for item in prompt if isinstance(item, dict)]
    if messages:
        rendered = encoding.rendered(messages, wishes)
        _check_length(encoding, rendered.text, most)
        return encoding.encode_rest(rendered)
    tokens = [item for item in prompt if isinstance(item, int)]
    check_tokens(engine, tokens, "prompt")
    return tokens


def check_tokens(engine: Engine, tokens: Items[int], param: str) -> None:
    """Raises ApiError for an id that the model has no row for."""
    most = engine.vocabulary
    wrong = next((token for token in tokens if not 0 <= token < most), None)
    if wrong is not None:
        raise ApiError(400, "invalid_token", f"token {wrong} is not in 0 to {most - 1}.", param=param)


def prompt_of(engine: Engine, asked: HttpRequest) -> list[int]:
    """The tokens of a chat's prompt, however many. Raises ApiError."""
    (prompt,) = asked.prompts
    return _encoded(engine, prompt, _thinking(engine, asked)[0])


def rendered(engine: Engine, asked: HttpRequest) -> str:
    """A chat's prompt as its template writes it. Raises ApiError."""
    (prompt,) = asked.prompts
    messages: list[Message] = [item for item in prompt if isinstance(item, dict)]
    try:
        return engine.encoding.rendered(messages, _thinking(engine, asked)[0]).text
    except (BadMessages, BadText) as problem:
        raise bad_request(problem.what, "messages", problem.code) from None


def _chat(engine: Engine, asked: HttpRequest) -> Prepared:
    wishes, notes = _thinking(engine, asked)
    form = form_of(engine.encoding, wishes, asked)
    (prompt,) = asked.prompts
    tokens = _fitting(engine, asked, prompt, wishes)
    text = PromptText(tokens, engine.encoding.images_in(tokens), form=form)
    bound = bound_of(form, text.tokens, asked)
    if bound is None:
        return Prepared([text], notes)
    grammar = _read(engine, bound.text, asked.shape.field if asked.shape else "tools")
    if asked.shape and wishes.ends_in == "message":  # calls may follow any text
        grammar = _after_message(engine, grammar, prompt)
    return Prepared([replace(text, grammar=grammar)], (*notes, *bound.notes))


def _after_message(engine: Engine, grammar: Grammar, prompt: Prompt) -> Grammar:
    """What may follow the last message of a prompt, which is the beginning of the answer. Raises ApiError."""
    last = prompt[-1]
    begun = text_in(last["content"]) if isinstance(last, dict) else ""
    try:
        return grammar.after(engine.encoding.encode_part(begun)) if begun else grammar
    except BadGrammar as problem:
        raise bad_request(problem.what, "continue_final_message", problem.code) from None


def _thinking(engine: Engine, asked: HttpRequest) -> tuple[Wishes, tuple[str, ...]]:
    """The wishes for the template, how much to think among them, and what to say of that."""
    wishes = asked.wishes or Wishes()
    if asked.thinking is None:
        return wishes, asked.notes
    thinking = form_of(engine.encoding, wishes, asked).thinking(asked.thinking)
    notes = () if thinking.variables else (f"the wish to think has no effect: {thinking.effect}",)
    return replace(wishes, variables={**thinking.variables, **wishes.variables}), (*asked.notes, *notes)


def form_of(encoding: Encoding, wishes: Wishes, asked: HttpRequest) -> Format:
    """How answers to this request are read."""
    form = format_of(encoding, wishes)
    return form.without_calls if asked.calls_forbidden else form


def bound_of(form: Format, prompt: Items[int], asked: HttpRequest) -> Bound | None:
    """What an answer must look like, from the end of its thought on; None if it is free. Raises ApiError."""
    opened = form.reader(prompt).thinking
    shape, tools = asked.shape, asked.tools
    whole = None if shape is None else Whole(shape.schema, shape.regex, shape.grammar)
    shaped = None if shape is None or whole is None else _shaped(form, whole, shape.field, opened)
    if tools is None:
        return shaped
    if not form.calls:
        raise ApiError(400, "unsupported_parameter", f"tools cannot be called: {form.refusal}.", param="tools")
    if not form.enforceable and tools.choice == "auto" and whole is None:
        return None
    try:
        return form.grammar(tools.offered, tools.choice, tools.parallel, whole, opened)
    except BadGrammar as problem:
        raise bad_request(problem.what, "tools", problem.code) from None


def _shaped(form: Format, whole: Whole, field: str, opened: bool) -> Bound:
    """What a whole answer must look like. Raises ApiError."""
    try:
        return form.grammar((), "auto", whole=whole, thought_open=opened)
    except BadGrammar as problem:
        raise bad_request(problem.what, field, problem.code) from None


def grammar_of(shape: AnswerShape) -> str:
    """The grammar of a whole text."""
    from specexec.sampling.grammar import json_schema, regex  # with torch, which is there once the engine is

    if shape.grammar is not None:
        return shape.grammar
    return json_schema(shape.schema) if shape.schema is not None else regex(shape.regex or "")


def _raw(engine: Engine, asked: HttpRequest, prompt: Prompt) -> PromptText:
    tokens = _fitting(engine, asked, prompt, asked.wishes)
    echo = "" if not asked.echo else prompt if isinstance(prompt, str) else engine.decode(tokens)
    return PromptText(tokens, echo=echo)


def _fitting(engine: Engine, asked: HttpRequest, prompt: Prompt, wishes: Wishes | None) -> list[int]:
    """The prompt's tokens, which leave room for the answer."""
    if asked.suffix is not None and isinstance(prompt, str):
        tokens = _between(engine, prompt, asked)
    else:
        tokens = _encoded(engine, prompt, wishes, engine.context)
    answer = 1 if asked.cut_by_context else asked.max_tokens or 1
    needed = len(tokens) + answer
    if needed > engine.context:
        raise api_error(
            ContextLengthExceeded(
                f"this model's maximum context length is {engine.context} tokens, but {needed} were requested: "
                f"{len(tokens)} in the prompt and {answer} for the answer."
            )
        )
    return tokens


def _between(engine: Engine, before: str, asked: HttpRequest) -> list[int]:
    """The prompt for what stands before a suffix. Raises ApiError where the model has no tokens for that."""
    _check_length(engine.encoding, before + (asked.suffix or ""), engine.context)
    room = engine.context - (1 if asked.cut_by_context else asked.max_tokens or 1)
    tokens = engine.encoding.infill(before, asked.suffix or "", asked.wishes, asked.others, room)
    if tokens is None:
        what = "suffix: this model's vocabulary has no tokens for filling in text (fill-in-the-middle)."
        raise bad_request(what, "suffix", "unsupported_parameter")
    return tokens


def _encoded(engine: Engine, prompt: Prompt, wishes: Wishes | None, most: int | None = None) -> list[int]:
    try:
        tokens = encode(engine, prompt, wishes, most=most)
    except (BadMessages, BadText) as problem:
        place = re.match(r"messages\.\d+[.\w]*", problem.what)
        what = f"{problem.what} {problem.why}" if problem.why else problem.what
        raise bad_request(what, place and place[0], problem.code) from None
    if not tokens:
        raise api_error(EmptyPrompt("the prompt is empty."))
    return tokens


def _check_length(encoding: Encoding, text: str, most: int | None) -> None:
    least = len(text) // _longest_token(encoding)
    if most is not None and least > most:
        raise api_error(
            ContextLengthExceeded(
                f"this model's maximum context length is {most} tokens; the prompt has {len(text):,} characters, "
                f"which are at least {least}."
            )
        )


@lru_cache(maxsize=4)
def _longest_token(encoding: Encoding) -> int:
    """Characters of one token at most."""
    vocabulary: Mapping[str, int] = encoding.tokenizer.get_vocab()
    return max(map(len, vocabulary), default=1)


def _read(engine: Engine, grammar: str, param: str) -> Grammar:
    try:
        return engine.grammar(grammar)
    except BadGrammar as problem:
        raise bad_request(problem.what, param, problem.code) from None
