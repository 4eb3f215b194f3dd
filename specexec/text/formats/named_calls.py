"""Calls written as a name and then the arguments as JSON, with marks around and between."""

from __future__ import annotations

import re
from collections.abc import Sequence as Items
from dataclasses import dataclass

from specexec.pieces import Call, Malformed, Unfinished, call_of
from specexec.text.formats.json_calls import json_at_start
from specexec.text.formats.kinds import Kinds
from specexec.text.formats.rules import Rules, Tool
from specexec.text.formats.xml_calls import HOLES, blank, literals_of


@dataclass(frozen=True)
class NamedCalls:
    """`begin` and then `body`, where {name}, {id}, {index} and {arguments} are those of a call, then `end`."""

    begin: str
    body: str
    end: str = ""
    own_id: str = "{id}"
    several: bool = False

    @property
    def literals(self) -> Items[str]:
        return literals_of(self.begin + self.body + self.end)

    def calls(self, text: str, kinds: Kinds) -> list[Call]:
        """The call between the marks. Raises Malformed, Unfinished."""
        head, _, tail = self.body.partition("{arguments}")
        found = re.match(_pattern(head), text)
        if found is None:
            raise Malformed
        arguments, rest = json_at_start(text[found.end() :])
        if not isinstance(arguments, dict):
            raise Malformed
        if rest.strip() != tail.strip():
            raise Unfinished if tail.strip().startswith(rest.strip()) else Malformed
        said = found.groupdict()
        own_id = self.own_id.format(**said) if set(HOLES.findall(self.own_id)) <= set(said) else None
        return [call_of(said["name"], arguments, own_id)]

    def closes(self, text: str) -> bool:
        return True

    def rules(self, rules: Rules, tools: Items[Tool], parallel: bool) -> str:
        """Rules for one call from behind its first mark."""
        return rules.add("calls", " | ".join(self._rule(rules, at, tool) for at, tool in enumerate(tools)))

    def _rule(self, rules: Rules, at: int, tool: Tool) -> str:
        said = {
            "name": rules.literal(tool.name),
            "id": "/[a-zA-Z0-9]{9}/",
            "index": "/[0-9]+/",
            "arguments": rules.add(f"arguments_{at}", rules.json(tool.schema, tool.lenient)),
        }
        parts = HOLES.split(self.body + self.end)
        written = [said[part] if place % 2 else rules.literal(part) for place, part in enumerate(parts) if part]
        return rules.add(f"call_{at}", " ".join(written))


def _pattern(head: str) -> str:
    """The text before the arguments as a regular expression that is lenient about blank space."""
    texts = HOLES.split(head)
    parts = [f"(?P<{text}>[^\\s{{]+?)" if at % 2 else blank(text) for at, text in enumerate(texts)]
    return r"\s*" + "".join(parts)
