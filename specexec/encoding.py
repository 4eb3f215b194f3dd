"""Prompts into tokens and back, as the model's own tokenizer and chat template have it. Needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specexec.errors import BadMessages, BadText, TokenizerMismatch
from specexec.patience import at_most
from specexec.text.messages import (
    PROBE_TOOLS,
    Message,
    Prompt,
    Traits,
    as_read,
    needs_traits,
    read_messages,
    traits_of,
)
from specexec.wishes import EndsIn, Wishes

TEMPLATE_S = 5.0  # of a processor's time; templates of real models take milliseconds
MOST_CHARACTERS = 16 * 1024 * 1024

ROUND_TRIP = "One Word, two  spaces;\n\tx = 'é' + \"→\"  # 42"


class Encoding:
    """One model's tokenizer. `thinking` is what its template is told about thoughts (see `Format.thinking`).

    `variables` are told to the template with every prompt; a prompt's own wishes go before them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.thinking: Mapping[str, object] = {}
        self.variables: dict[str, object] = {}
        self._traits: dict[str, Traits] = {}

    @staticmethod
    def of(folder: Path, trust_remote_code: bool = False) -> Encoding:
        """The tokenizer of a model folder; with trust, as code in that folder defines it."""
        return Encoding(
            AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
        )

    def encode(self, prompt: Prompt, wishes: Wishes | None = None) -> list[int]:
        """Token ids of raw text, of messages through the model's chat template, or the ids themselves.

        Raises BadText, BadMessages.
        """
        if isinstance(prompt, str):
            return self._cut(prompt, special=True)
        messages = [item for item in prompt if not isinstance(item, int)]
        if not messages:
            return [item for item in prompt if isinstance(item, int)]
        return self.encode_rest(self.render(messages, wishes))

    def render(self, messages: Items[Mapping[str, object]], wishes: Wishes | None = None) -> str:
        """The text that messages become before it is cut into tokens. Raises BadText, BadMessages."""
        wishes = wishes or Wishes()
        read = read_messages(messages)
        traits = self._traits_for(wishes) if needs_traits(read) else Traits()
        variables = {**self.thinking, **self.variables, **wishes.variables}
        text = self._rendered(as_read(read, traits), wishes.tools, variables, wishes.ends_in)
        if len(text) > MOST_CHARACTERS:
            raise BadMessages(
                f"the model's chat template made {len(text):,} characters; {MOST_CHARACTERS:,} are allowed."
            )
        return text

    def _traits_for(self, wishes: Wishes) -> Traits:
        template = self.template_for(wishes)
        if template not in self._traits:
            self._traits[template] = traits_of(partial(self._shown, wishes))
        return self._traits[template]

    def _shown(self, wishes: Wishes, messages: list[Message], tools: bool) -> str | None:
        try:
            return self._rendered(messages, wishes.tools or PROBE_TOOLS if tools else wishes.tools, {}, "answer")
        except BadMessages:
            return None

    def _rendered(
        self, messages: list[Message], tools: Items[Message], variables: Mapping[str, Any], ends_in: EndsIn
    ) -> str:
        try:
            with at_most(TEMPLATE_S):
                return str(
                    self.tokenizer.apply_chat_template(
                        messages,  # type: ignore[arg-type]  # templates read more than strings
                        tools=list(tools) or None,
                        add_generation_prompt=ends_in == "answer",
                        continue_final_message=ends_in == "message",
                        tokenize=False,
                        **variables,
                    )
                )
        except TimeoutError as problem:
            raise BadMessages(f"the model's chat template did not end within {TEMPLATE_S:g} s.") from problem
        except (TemplateError, ValueError, TypeError) as problem:
            raise BadMessages(f"the model's chat template refuses these messages: {problem}") from problem

    def template_for(self, wishes: Wishes) -> str:
        """The source of the template that would be used; a model may have one for tools and one without."""
        return str(self.tokenizer.get_chat_template(tools=list(wishes.tools) or None))

    @property
    def template(self) -> str | None:
        """The chat template as the model brings it."""
        template = self.tokenizer.chat_template
        return None if template is None else str(template)

    def encode_rest(self, text: str) -> list[int]:
        """Token ids of text that a template has made: it holds its own special tokens, none are added."""
        return self._cut(text, special=False)

    def _cut(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of a command line or \ud800 in JSON; a tokenizer fails in its own words
            raise BadText("the prompt is not text: it holds half a character or bytes that are not UTF-8.") from None
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
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode(self, tokens: Items[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def same_vocabulary(target: Encoding, draft: Encoding) -> bool:
    """The same id is the same string in both; one may have more ids at the end (padded vocabularies)."""
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    string_of = {token: text for text, token in theirs.items()}
    return all(string_of.get(token, text) == text for text, token in ours.items())


def check_translatable(draft: Encoding, drafter: Path) -> None:
    """Raises TokenizerMismatch for a drafter whose tokenizer does not give back the text it is given."""
    text = draft.raw(draft.encode_rest(ROUND_TRIP))
    if text != ROUND_TRIP:
        raise TokenizerMismatch(
            f"drafter {drafter} does not share the model's vocabulary, and its tokenizer changes text "
            f"({ROUND_TRIP!r} comes back as {text!r}).",
            hint="--drafter none, --drafter auto, or a drafter of the same family.",
        )
