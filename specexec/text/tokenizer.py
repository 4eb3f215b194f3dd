"""Prompts into tokens and back, as the model's own tokenizer and chat template have it. Needs no weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specexec.errors import BadMessages, BadText
from specexec.model.image_rows import Image, is_row
from specexec.text import templates
from specexec.text.control_tokens import ControlTokens, Rendered
from specexec.text.detokenizer import TextStream
from specexec.text.image_prompts import MOST_IMAGES, ImagePrompts
from specexec.text.infill import BETWEEN, FILE, PROJECT, InfillMarks, OtherText, infill_marks
from specexec.text.messages import (
    PROBE_TOOLS,
    Message,
    Prompt,
    Traits,
    all_text,
    as_read,
    completed,
    needs_traits,
    pictures_in,
    read_messages,
    traits_of,
)
from specexec.text.template_options import Wishes

log = logging.getLogger(__name__)

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece's names of single bytes


class Encoding:
    """One model's tokenizer and chat template; safe to use from several threads.

    `variables` are given to the template with every prompt, before them `thinking` (see `Format.thinking`); a prompt's
    own wishes go before both. `control_tokens`: those that are spelled in raw text and messages become tokens; else
    they stay text. `adds_bos`: raw text begins with the BOS token, whatever the tokenizer itself does. `look` says how
    images are read, or why they are not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, adds_bos: bool = False) -> None:
        self.tokenizer = tokenizer
        self.thinking: Mapping[str, object] = {}
        self.variables: dict[str, object] = {}
        self.control_tokens = False
        self.look: Callable[[], ImagePrompts | str] = str
        self._adds_bos = adds_bos
        self._warned = False
        self._traits: dict[str, Traits] = {}
        self._words: dict[int, str] = {}  # what tokens are alone, which is asked for each that is written

    @staticmethod
    def of(folder: Path, trust_remote_code: bool = False) -> Encoding:
        """The tokenizer of a model folder; with trust, as code in that folder defines it."""
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer("")  # sets what the first call sets, before there are threads
        config = folder / "tokenizer_config.json"
        # transformers 5.23 forgets it for tokenizer.json files that do not say the same, such as DeepSeek-V3's.
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        return Encoding(tokenizer, adds_bos=settings.get("add_bos_token") is True)

    def encode(self, prompt: Prompt, wishes: Wishes | None = None) -> list[int]:
        """Token ids of raw text, of messages through the model's chat template, or the ids themselves.

        Raises BadText, BadMessages.
        """
        if isinstance(prompt, str):
            return self._raw(prompt, wishes or Wishes())
        messages = [item for item in prompt if not isinstance(item, int)]
        if not messages:
            return [item for item in prompt if isinstance(item, int)]
        return self.encode_rest(self.rendered(messages, wishes))

    def render(self, messages: Items[Mapping[str, object]], wishes: Wishes | None = None) -> str:
        """The text that messages become before it is cut into tokens. Raises BadText, BadMessages."""
        return self.rendered(messages, wishes).text

    def rendered(self, messages: Items[Mapping[str, object]], wishes: Wishes | None = None) -> Rendered:
        """The same, for `encode_rest`: it still knows which control tokens the template wrote."""
        if not messages:
            raise BadMessages("there is no message.")
        wishes = wishes or Wishes()
        read = read_messages(messages, "" if all_text(messages) else self._blind)
        read, files = pictures_in(read)
        images = self._images_of(files)
        read = as_read(read, self._traits_for(wishes) if needs_traits(read) else Traits())
        wishes = replace(wishes, variables={**self.thinking, **self.variables, **wishes.variables})
        given: list[object] = [read, wishes.tools, wishes.variables]
        if self._takes_control(wishes) or not self._control.spelled_in(given):
            return self._rendered_with(self._templated(read, wishes), {}, images)
        marks = self._control.marks_for(given)
        tools: Any = self._control.mark(wishes.tools, marks)
        variables: Any = self._control.mark(wishes.variables, marks)
        marked = replace(wishes, tools=tuple(tools), variables=variables)
        return self._rendered_with(self._templated(self._marked(read, marks), marked), marks, images)

    def _images_of(self, files: Items[tuple[str, bytes]]) -> tuple[Image, ...]:
        if len(files) > MOST_IMAGES:
            raise BadMessages(f"{files[MOST_IMAGES][0]}: a prompt may have {MOST_IMAGES} images.")
        return tuple(self.images.image(content, at) for at, content in files) if files and self.images else ()

    def _rendered_with(self, text: str, marks: Mapping[str, str], images: tuple[Image, ...]) -> Rendered:
        if images and self.images:
            text = self.images.spelled(text, images)
        return Rendered(text, marks, images)

    def encode_rest(self, text: str | Rendered) -> list[int]:
        """Token ids of text that a template has made: it holds its own special tokens, none are added."""
        if not isinstance(text, Rendered):
            return self._cut(text)
        tokens = self._control.encode(text) if text.marks else self._cut(text.text)
        return self.images.with_rows(tokens, text.images) if text.images and self.images else tokens

    def encode_part(self, text: str, wishes: Wishes | None = None) -> list[int]:
        """Token ids of a part of a prompt, with nothing around it; spelled control tokens are as in `encode`."""
        if self._takes_control(wishes or Wishes()) or not self._control.spelled_in(text):
            return self._cut(text)
        _check(text)
        marks = self._control.marks_for(text)
        return self._control.encode(Rendered(str(self._control.mark(text, marks)), marks))

    def infill(
        self, before: str, after: str, wishes: Wishes | None = None, others: Items[OtherText] = (), most: int = 0
    ) -> list[int] | None:
        """Token ids of a prompt for what stands between two texts; None where the vocabulary has no marks for it.

        `others` stand before, as many of the last ones as fit into `most` tokens with the rest.
        """
        if (marks := self._infill) is None:
            return None
        bos = self.tokenizer.bos_token_id
        begin = [bos] if bos is not None and self._raw("x", Wishes())[:1] == [bos] else []
        first, then = (self.encode_part(text, wishes) for text in (before, after))
        asked = [marks.before, *first, marks.after, *then, marks.answer]
        return [*begin, *self._before_infill(marks, others, most - len(begin) - len(asked), wishes), *asked]

    def _before_infill(
        self, marks: InfillMarks, others: Items[OtherText], room: int, wishes: Wishes | None
    ) -> list[int]:
        cut = partial(self.encode_part, wishes=wishes)
        head, tail = list[int](), list[int]()
        if marks.files is not None:
            project, file = marks.files
            head, tail = [project, *cut(PROJECT)], [file, *cut(FILE)]
        kept = list[int]()
        for other in reversed(others):
            named = cut(BETWEEN) if marks.files is None else [marks.files[1], *cut(f"{other.name}\n")]
            one = [*named, *cut(other.text)]
            if len(head) + len(one) + len(kept) + len(tail) > room:
                break
            kept = one + kept
        return [*head, *kept, *tail] if kept else []

    @cached_property
    def _infill(self) -> InfillMarks | None:
        return infill_marks(self.tokenizer.get_vocab())

    def stream(self, before: Items[int], stop: Items[str] = ()) -> TextStream:
        """The growing text of tokens that follow `before`, such as a prompt: with the blank between both, if any."""
        return TextStream(self.decode, stop, self._single_bytes, self._lead(before))

    def answer(self, before: Items[int], tokens: Items[int]) -> str:
        """Text of tokens that follow `before`, without special ones: what `stream` gives in all."""
        lead = self._lead(before)
        return self.decode([*lead, *tokens])[len(self.decode(lead)) :]

    def _marked(self, messages: list[Message], marks: Mapping[str, str]) -> list[Message]:
        """In what an assistant said, words for thoughts and calls stay what they are: its template reads them."""
        marked: list[Message] = []
        for message in messages:
            own = message["role"] == "assistant"
            content = self._control.mark(message["content"], marks, special_only=own)
            others = self._control.mark({**message, "content": ""}, marks)
            assert isinstance(others, dict)
            marked.append({**others, "content": content})
        return marked

    def _takes_control(self, wishes: Wishes) -> bool:
        return self.control_tokens if wishes.control_tokens is None else wishes.control_tokens

    @property
    def images(self) -> ImagePrompts | None:
        """How images are read in prompts; None where they are refused."""
        return None if isinstance(self._looked, str) else self._looked

    def images_in(self, tokens: Items[int]) -> tuple[Image, ...]:
        """Those whose rows are among the tokens of a prompt; a text that waits to be written holds them by these."""
        found = self.images.images.among(tokens) if any(map(is_row, tokens)) and self.images else ()
        return found or ()

    def in_vocabulary(self, tokens: list[int]) -> list[int]:
        """The same ids with the tokenizer's own for each row of an image, for those who read ids and not prompts."""
        return self.images.images.as_words(tokens) if any(map(is_row, tokens)) and self.images else tokens

    def refuse_images(self, why: str) -> None:
        """From now on messages that hold an image are refused; what was said before stays the reason."""
        if self.images is not None:
            self._looked = why

    @property
    def _blind(self) -> str | None:
        return self._looked if isinstance(self._looked, str) else None

    @cached_property
    def _looked(self) -> ImagePrompts | str:
        return self.look()

    @cached_property
    def _control(self) -> ControlTokens:
        template = self.tokenizer.chat_template or ""
        return ControlTokens(self.tokenizer, template if isinstance(template, str) else "".join(template.values()))

    def _raw(self, text: str, wishes: Wishes) -> list[int]:
        if self._takes_control(wishes) or not self._control.spelled_in(text):
            tokens = self._cut(text, special=True)
        else:
            self._warn_once()
            before, after = self._around
            tokens = [*before, *self.encode_part(text, wishes), *after]
        bos = self.tokenizer.bos_token_id
        if self._adds_bos and bos is not None and tokens[:1] != [bos]:
            return [bos, *tokens]
        return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens

    def _warn_once(self) -> None:
        if not self._warned:
            log.warning("a prompt spells control tokens; they are read as text (--allow-control-tokens: as tokens)")
        self._warned = True

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer adds before and after raw text."""
        bare, whole = self._cut("x"), self._cut("x", special=True)
        at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]

    @cached_property
    def _single_bytes(self) -> frozenset[int]:
        ids = [self.tokenizer.convert_tokens_to_ids(name) for name in _BYTES]  # a whole vocabulary takes 100 ms to list
        known = [token for token in ids if isinstance(token, int)]
        names = self.tokenizer.convert_ids_to_tokens(known)
        return frozenset(token for token, name in zip(known, names, strict=True) if name in _BYTES)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _lead(self, before: Items[int]) -> list[int]:
        """A token that makes the decoder see that a text goes on; none where the text may count as beginning."""
        if not before:
            return []
        last, plain = before[-1], self._cut("x")
        if last in self._added and self._cut(f"{self.spell(last)}x")[-len(plain) :] == plain:
            return []  # after such a token, tokenizers of the kind put a blank themselves
        return plain[-1:]

    def _traits_for(self, wishes: Wishes) -> Traits:
        template = self._template(wishes)
        if template not in self._traits:
            self._traits[template] = traits_of(partial(self._shown, wishes))
        return self._traits[template]

    def _shown(self, wishes: Wishes, messages: list[Message], tools: bool) -> str | None:
        offered = wishes.tools or PROBE_TOOLS if tools else wishes.tools
        try:
            return self._templated(messages, Wishes(tools=tuple(offered)))
        except BadMessages:
            return None

    def _templated(self, messages: Items[Message], wishes: Wishes) -> str:
        try:
            return self._rendered(messages, wishes)
        except BadMessages:
            complete = tuple(completed(tool) for tool in wishes.tools)
            if complete == wishes.tools:
                raise
            return self._rendered(messages, replace(wishes, tools=complete))

    def _rendered(self, messages: Items[Message], wishes: Wishes) -> str:
        variables: dict[str, Any] = {
            "tools": list(wishes.tools) or None,
            "add_generation_prompt": wishes.ends_in == "answer",
            "continue_final_message": wishes.ends_in == "message",
            **wishes.variables,
        }
        kind = type(self.tokenizer)
        if kind.apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # a model's own code
            try:
                return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **variables))  # type: ignore[arg-type]  # templates read more than strings
            except Exception as problem:
                raise BadMessages(f"the model's chat template refuses these messages: {problem}") from problem
        return templates.render(self._template(wishes), messages, {**self.tokenizer.special_tokens_map, **variables})

    def _template(self, wishes: Wishes) -> str:
        try:
            return self.template_for(wishes)
        except ValueError as problem:
            raise BadMessages(f"this model's tokenizer has no chat template for messages: {problem}") from problem

    def template_for(self, wishes: Wishes) -> str:
        """The source of the template that would be used; a model may have one for tools and one without.

        Raises ValueError if it has none.
        """
        return str(self.tokenizer.get_chat_template(tools=list(wishes.tools) or None))

    @property
    def template(self) -> str | None:
        """The chat template as the model brings it."""
        template = self.tokenizer.chat_template
        return None if template is None else str(template)

    def _cut(self, text: str, special: bool = False) -> list[int]:
        _check(text)
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def spell(self, token: int) -> str:
        """One token as text, special ones too."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def piece(self, before: int | None, token: int) -> str:
        """What a token adds to the text after another one, special ones too; some decoders drop a leading blank."""
        if before is None:
            return self.spell(token)
        both = str(self.tokenizer.decode([before, token], skip_special_tokens=False))
        return both[len(self.spell(before)) :]

    def raw(self, tokens: Items[int]) -> str:
        """Text of tokens as it is, special ones included."""
        words = [f"<image row {token}>" if is_row(token) else token for token in tokens]
        parts = [list(part) for _, part in groupby(words, type)]
        return "".join("".join(map(str, part)) if isinstance(part[0], str) else self._spelled(part) for part in parts)

    def _spelled(self, tokens: Items[object]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))  # type: ignore[arg-type]  # ids

    def decode(self, tokens: Items[int]) -> str:
        """Text of tokens, without special ones."""
        if len(tokens) != 1:
            return self._decoded(tokens)
        if tokens[0] not in self._words:
            self._words[tokens[0]] = self._decoded(tokens)
        return self._words[tokens[0]]

    def _decoded(self, tokens: Items[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _check(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line or \ud800 in JSON; a tokenizer fails in its own words
        raise BadText("the prompt is not text: it holds half a character or bytes that are not UTF-8.") from None
