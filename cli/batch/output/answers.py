"""The texts of one item, read as the server reads them: content, thoughts and calls apart."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.openai.choice import Choice
    from specexec.stats import Completion


@dataclass(frozen=True)
class ItemAnswer:
    """All texts of an item. `notes` say what of its wishes had no effect."""

    completions: tuple[Completion, ...]
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What was said: thoughts and calls are not part of it."""
        return "\n\n".join(choice.echo + choice.piece.content for choice in self.choices)

    @property
    def shown(self) -> str:
        """The same for people, who see calls as JSON, one a line."""
        calls = [call for choice in self.choices for call in choice.piece.calls]
        lines = [json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False) for call in calls]
        return "\n".join([*filter(None, [self.text]), *lines])

    @property
    def tokens(self) -> int:
        """How many were written."""
        return sum(len(one.tokens) for one in self.completions)

    def free(self) -> ItemAnswer:
        """The same for another item, which it cost nothing."""
        spent = (replace(one, sweeps=0, bytes_read=0, seconds=0.0) for one in self.completions)
        return replace(self, completions=tuple(spent))
