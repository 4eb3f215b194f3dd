"""One item of a run: its id, its prompt, its options. Knows no file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from specexec.errors import SpecexecError
from specexec.sampling.params import SamplingParams, derived_seed
from specexec.text.template_options import Wishes

if TYPE_CHECKING:
    from cli.openai.parse import HttpRequest

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Message: TypeAlias = dict[str, object]
Prompt: TypeAlias = str | list[int] | list[Message]  # raw text, token ids, or messages for the chat template


@dataclass(frozen=True)
class Item:
    """A line to answer, or the reason why it cannot be. `wishes` replace the run's own sampling.

    `asked` is the line as a request: it may want several texts, tools, a schema. `answered`: the line also held an
    answer, which is left out. `duplicate_of` is the id of the first item that asks the same, if one answer shall
    serve both.
    """

    id: str
    prompt: Prompt = ""
    wishes: Mapping[str, object] = field(default_factory=dict)
    problem: SpecexecError | None = None
    index: int = 0
    duplicate_of: str | None = None
    asked: HttpRequest | None = None
    answered: bool = False

    @property
    def prompt_sha(self) -> str:
        """Changes with anything that could change the answer and is the item's own."""
        asked = [self.prompt, dict(sorted(self.wishes.items())), *filter(None, [self._more])]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=True).encode()).hexdigest()[:16]

    @property
    def chat(self) -> bool:
        """Whether it asks for a message; else for the continuation of a text."""
        return isinstance(self.prompt, list) and any(isinstance(one, dict) for one in self.prompt)

    def sampling(self, run: SamplingParams) -> SamplingParams:
        """How to answer: the run's choice, a seed of the item's own, and on top what the item wishes.

        The seed belongs to the item, so that its text depends on no other item and no order.
        """
        seed = derived_seed(run.seed or 0, self.duplicate_of or self.id)
        return replace(run, **{"seed": seed, **self.wishes})  # type: ignore[arg-type]  # read_chat has checked

    def texts(self, run: SamplingParams) -> list[ItemText]:
        """All texts that it asks for; further choices of a prompt have seeds derived from the first one's."""
        from cli.openai.parse import seed_of  # pydantic: not for those who only want --help

        first = self.sampling(run)
        if self.asked is None:
            return [ItemText(self.prompt, first)]
        seeds = [seed_of(choice, first.seed or 0) for choice in range(self.asked.n)]
        return [ItemText(prompt, replace(first, seed=seed)) for prompt in self.prompts for seed in seeds]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All its prompts; a completion may have several."""
        return (self.prompt, *(self.asked.prompts[1:] if self.asked is not None else ()))

    def with_prompts(self, prompts: tuple[Prompt, ...]) -> Item:
        """The same with other prompts."""
        asked = self.asked if self.asked is None else replace(self.asked, prompts=list(prompts))
        return replace(self, prompt=prompts[0], asked=asked)

    @property
    def count(self) -> int:
        """How many texts it asks for."""
        return 1 if self.asked is None else self.asked.n * len(self.asked.prompts)

    @property
    def template(self) -> Wishes | None:
        """What it wants the chat template to get."""
        return None if self.asked is None else self.asked.wishes

    @property
    def _more(self) -> dict[str, object]:
        """What it asks beyond a prompt and sampling."""
        if self.asked is None:
            return {}
        asked, template, tools = self.asked, self.asked.wishes or Wishes(), self.asked.tools
        more = {
            "prompts": asked.prompts[1:],
            "n": asked.n if asked.n > 1 else None,
            "echo": asked.echo,
            "shape": asked.shape and asdict(asked.shape),
            "tools": template.tools,
            "choice": [tools.choice, tools.parallel] if tools else None,
            "variables": dict(template.variables),
            "ends_in": template.ends_in if template.ends_in != "answer" else None,
        }
        return {name: value for name, value in more.items() if value}


@dataclass(frozen=True)
class ItemText:
    """One of the texts that an item asks for."""

    prompt: Prompt
    sampling: SamplingParams


def is_text(text: str) -> bool:
    """Whether it can be written down: JSON may spell half characters that no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
