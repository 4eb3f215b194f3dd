"""Grammars in llguidance's Lark: marks that are tokens as those tokens, everything else as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from specexec.sampling.json_schema import followed, laid_out, usable
from specexec.text.formats.marks import Marks

ANY = r"/(.|\n)*/"
TRUTH = '"true" | "false" | "True" | "False"'  # as JSON has it, and as templates write it
_NO_ARGUMENTS: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Bound:
    """A grammar, and one sentence for everything of what was asked that it leaves out."""

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A function that may be called. `schema` describes its arguments as far as a grammar can hold to it."""

    name: str
    schema: Mapping[str, object]
    lenient: bool = True

    @property
    def properties(self) -> Mapping[str, object]:
        found = self.schema.get("properties")
        return found if isinstance(found, Mapping) else {}

    @property
    def required(self) -> Items[str]:
        found = self.schema.get("required")
        return found if isinstance(found, list) else []

    def inner(self, schema: object) -> Mapping[str, object]:
        """The schema of one argument, with the definitions that it may refer to."""
        known = {key: self.schema[key] for key in ("$defs", "definitions") if key in self.schema}
        return {**known, **schema} if isinstance(schema, Mapping) else {}


@dataclass
class Rules:
    """The rules of one grammar as they are written down."""

    marks: Marks
    lines: list[str] = field(default_factory=list)

    def add(self, name: str, body: str) -> str:
        """A rule, or a terminal if its name is in capitals; gives the name that it got, which is its own."""
        bare, lazy, rest = name.partition("[")
        taken = {line.partition(":")[0].partition("[")[0] for line in self.lines}
        while bare in taken:
            bare += "X" if bare.isupper() else "x"
        self.lines.append(f"{bare}{lazy}{rest}: {body}")
        return bare

    def literal(self, text: str) -> str:
        """Exactly this text, its marks as tokens."""
        parts = self.marks.parts(text)
        return " ".join(f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in parts) or '""'

    def json(self, schema: Mapping[str, object], lenient: bool) -> str:
        return f"%json {json.dumps(laid_out(schema, lenient))}"

    def regex(self, pattern: str) -> str:
        """Text that matches from end to end (Rust's syntax)."""
        escaped = re.sub(r"(?s)\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], pattern)
        return "/" + escaped.replace("\n", "\\n") + "/"

    def anything(self) -> str:
        """Any text without control tokens."""
        if f"ANYTHING: {ANY}" not in self.lines:
            self.add("ANYTHING", ANY)
        return "ANYTHING"

    def until(self, mark: str, text: str = ANY) -> str:
        """Text and the mark that ends it: a token ends it by itself, a mark that is spelled where it first comes."""
        parts = self.marks.parts(mark)
        first = next((at for at, part in enumerate(parts) if isinstance(part, int)), None)
        if first is None:
            return self.add("until[lazy]", f"{self.add('TEXT', text)} {json.dumps(mark)}")
        before = json.dumps("".join(str(part) for part in parts[:first]))
        ended = self.add("TEXT", f"{text} {before}" if first else text)
        rest = [f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in parts[first:]]
        return " ".join([ended, *rest])

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Whole:
    """What the text of an answer must be: JSON that `schema` describes, what `regex` matches from end to end, or what
    `grammar` (Lark) allows.
    """

    schema: Mapping[str, object] | None = None
    regex: str | None = None
    grammar: str | None = None

    def rule(self, rules: Rules) -> str:
        """A rule of this text. Raises BadGrammar for a schema that cannot be followed."""
        if self.regex is not None:
            return rules.add("MATCH", rules.regex(self.regex))
        if self.grammar is not None:
            return rules.add("whole", f"%lark {{\n{self.grammar}\n}}")
        return rules.add("json", rules.json(followed(self.schema or {}), False))


def tools_of(offered: Iterable[Mapping[str, object]], choice: str) -> tuple[list[Tool], list[str]]:
    """The tools that may be called, and what is left out of them."""
    tools: list[Tool] = []
    notes: list[str] = []
    for at, entry in enumerate(offered):
        function = entry.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            notes.append(f"tools[{at}] of type {entry.get('type')!r} is left out: only functions can be called.")
        elif choice in ("auto", "required", name):
            parameters = function.get("parameters")
            lenient = not function.get("strict")
            found = usable(parameters if isinstance(parameters, Mapping) else _NO_ARGUMENTS, lenient)
            notes += [f"tool {name}: {note}" for note in found.notes]
            tools.append(Tool(name, found.schema or {"type": "object"}, lenient))
    return tools, notes


def options(must: Items[str], may: Items[str], comma: str) -> str:
    """Things one after another with commas between them, of which some may be missing."""
    between = json.dumps(comma)
    if must:
        return " ".join([f" {between} ".join(must), *(f"({between} {one})?" for one in may)])
    chains = [" ".join([one, *(f"({between} {later})?" for later in may[at + 1 :])]) for at, one in enumerate(may)]
    return f"({' | '.join(chains)})?" if chains else ""
