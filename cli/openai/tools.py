"""Tools that a model may call: what its answer must look like then, and the calls found in what it wrote.

Every family writes calls in its own way; the chat template tells which. Ways we cannot read are refused.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cli.openai.errors import ApiError
from specexec.text.detokenizer import begun

_NO_ARGUMENTS: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(BaseModel):
    """A tool's name and the JSON schema of its arguments."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """One entry of `tools`."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class Call:
    """One call; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Read:
    """What a piece of an answer came to: text for the reader, and calls that are complete."""

    text: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Way:
    """How a family writes a call: `begin` NAME `between` ARGUMENTS `end`, all of it between `sign` and `after`."""

    sign: str
    begin: str
    between: str
    end: str
    arguments: str
    after: str

    def call(self, text: str) -> Call | None:
        """A whole call without its sign, read; None if it is something else."""
        try:
            found = json.loads(text)
        except ValueError:
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str) or self.arguments not in found:
            return None
        return Call(found["name"], json.dumps(found[self.arguments], ensure_ascii=False))


HERMES = Way("<tool_call>", '\n{"name": "', '", "arguments": ', "}\n</tool_call>", "arguments", "</tool_call>")
LLAMA = Way("", '{"name": "', '", "parameters": ', "}", "parameters", "")


def way_of(template: str) -> Way:
    """How the model behind a chat template writes calls. Raises ApiError."""
    if HERMES.sign in template and "<function=" not in template:
        return HERMES
    if '{"name": function name, "parameters"' in template:
        return LLAMA
    what = "writes calls in a way that this server cannot read yet" if "tools" in template else "knows no tools"
    raise ApiError(400, "unsupported_parameter", f"this model's chat template {what}.", param="tools")


@dataclass(frozen=True)
class Tools:
    """What may be called. `choice` is auto, required, or the name of the one that must be."""

    offered: tuple[Tool, ...]
    choice: str
    parallel: bool

    def grammar(self, way: Way) -> str:
        """Answers that call these tools with arguments that fit their schemas, in Lark; text too if nothing must be."""
        from specexec.grammar import laid_out  # torch comes with it, and the server listens before that is there

        wanted = ("auto", "required")
        callable_now = [tool.function for tool in self.offered if self.choice in (*wanted, tool.function.name)]
        rules = [f"call: {' | '.join(f'call_{at}' for at in range(len(callable_now)))}"]
        for at, function in enumerate(callable_now):
            schema = laid_out(function.parameters or _NO_ARGUMENTS, lenient=not function.strict)
            head = json.dumps(way.begin + function.name + way.between)
            rules.append(f"call_{at}: {head} arguments_{at} {json.dumps(way.end)}")
            rules.append(f"arguments_{at}: %json {json.dumps(schema)}")
        return "\n".join([*self._starts(way), *rules])

    def _starts(self, way: Way) -> list[str]:
        many = "*" if self.parallel and way.sign else ""
        sign = json.dumps(way.sign) + " " if way.sign else ""
        if self.choice != "auto":
            again = f' ("\\n" {sign}call)*' if many else ""
            return [f"start: {sign}call{again}"]
        if way.sign:
            return [f"start: (called call){many or '?'} TEXT", f"called[lazy]: TEXT {sign}", r"TEXT: /(.|\n)*/"]
        return ["start: call | TEXT", r"TEXT: /([^{](.|\n)*)?/"]


class Reader:
    """Finds the calls in an answer as it comes. What only looks like one is text, and nothing of it is lost."""

    def __init__(self, way: Way | None) -> None:
        self._way = way
        self._held = ""

    def read(self, text: str, last: bool) -> Read:
        """The next piece; with `last`, whatever was held back comes out."""
        if self._way is None:
            return Read(text)
        self._held += text
        return self._signed(self._way, last) if self._way.sign else self._bare(self._way, last)

    def _signed(self, way: Way, last: bool) -> Read:
        said, calls = "", list[Call]()
        while (at := self._held.find(way.sign)) >= 0:
            inside, ended, rest = self._held[at + len(way.sign) :].partition(way.after)
            if not ended:
                said += self._take(at)
                break
            call = way.call(inside)
            if call is None:
                said += self._take(len(self._held) - len(rest))
            else:
                said += self._held[:at].rstrip("\n")
                calls.append(call)
                self._held = rest.lstrip("\n")
        else:
            said += self._take(len(self._held) - begun(self._held, (way.sign,)))
        return Read(said + (self._take(len(self._held)) if last else ""), tuple(calls))

    def _bare(self, way: Way, last: bool) -> Read:
        if self._held.startswith("{") and not last:
            return Read("")
        if last and (call := way.call(self._held)) is not None:
            return Read("", (call,))
        return Read(self._take(len(self._held)))

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken
