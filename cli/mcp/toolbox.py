"""Tools that an answer may call: what the model is told of them, whether a call is allowed, and what came of it."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from cli.mcp.config import meant
from cli.mcp.options import McpOptions
from cli.mcp.servers import CallFailed, McpServers, ServerTool
from cli.shared.quantities import format_count
from cli.terminal.lines import asked, can_ask
from cli.terminal.screen import Screen
from specexec.text.messages import Message

_SHOWN = 300  # characters of a result on the screen; the model reads all of it
_LONGEST_NAME = 64
DENIED = "The user does not allow this call."
STOPPED = "The user stopped this call."
QUESTION = "  allow {0}? y: from now on · o: only this call · n: no › "


@contextmanager
def opened_toolbox(options: McpOptions, screen: Screen) -> Iterator[Toolbox | None]:
    """The tools of all servers, which run for the length of the block; None where there are none.

    Raises BadConfig, McpFailed, MissingExtra.
    """
    if not options.servers:
        yield None
        return
    with McpServers(meant(options.servers), options.timeout_s) as servers:
        servers.start(lambda what: screen.status(lambda: what, plain_every_s=10.0))
        toolbox = Toolbox(servers, options, screen)
        for note in (note for server in servers.servers for note in server.notes):
            screen.tell(f"Note: {note}")
        screen.say(toolbox.introduction)
        yield toolbox


class Toolbox:
    """The tools under the names that the model reads: their own, and with their server's before it if two share one."""

    def __init__(self, servers: McpServers, options: McpOptions, screen: Screen) -> None:
        self._servers, self._screen = servers, screen
        self._everything, self._allowed = options.everything, set(options.allowed)
        shared = Counter(_plain(tool.name) for tool in servers.tools)
        self.tools: dict[str, ServerTool] = {}
        for tool in servers.tools:
            name = _plain(tool.name if shared[_plain(tool.name)] == 1 else f"{tool.server.name}_{tool.name}")
            while name in self.tools:
                name = f"_{name}"[:_LONGEST_NAME]
            self.tools[name] = tool
        self._allowed |= {name for name, tool in self.tools.items() if tool.name in tool.server.allowed}

    @property
    def definitions(self) -> tuple[Message, ...]:
        """All of them as functions, in OpenAI's shape."""
        return tuple(
            {
                "type": "function",
                "function": {"name": name, "description": tool.description or tool.title, "parameters": tool.schema},
            }
            for name, tool in self.tools.items()
        )

    @property
    def introduction(self) -> str:
        """The servers, and how many tools each brings."""
        counts = Counter(tool.server.name for tool in self.tools.values())
        each = [f"{server.name} ({counts[server.name]})" for server in self._servers.servers]
        return f"tools of {', '.join(each)}; /tools lists them"

    @property
    def lines(self) -> list[str]:
        """Every tool on a line of its own, below its server."""
        lines = []
        for server in self._servers.servers:
            lines.append(f"{server.name}: {server.where}")
            mine = {name: tool for name, tool in self.tools.items() if tool.server == server}
            for name, tool in mine.items():
                says = (tool.description or tool.title).strip().partition("\n")[0]
                asks = "" if self._is_allowed(name) else " (asks first)"
                lines.append(f"  {name}({', '.join(_parameters(tool))}){asks}  {says}".rstrip())
            if not mine:
                lines.append("  no tools")
        return lines

    def run(self, calls: Items[Message], most: int) -> Results:
        """Carry calls out one after the other, as far as they are allowed; a result is cut to `most` characters."""
        results = Results(most)
        for call in calls:
            function = call["function"]
            assert isinstance(function, dict)
            if results.stopped:
                said = STOPPED
            else:
                try:
                    said = self._run(str(function["name"]), str(function["arguments"]))
                except KeyboardInterrupt:
                    results.stopped, said = True, STOPPED
                    self._screen.tell("  stopped")
            if len(said) > most:
                self._screen.tell(f"  Note: only the first {format_count(most)} characters of this go to the model")
            result: Message = {"role": "tool", "tool_call_id": call["id"], "name": function["name"], "content": said}
            results.whole.append(result)
        return results

    def _run(self, name: str, arguments: str) -> str:
        tool = self.tools.get(name)
        if tool is None:
            return self._failed(f"there is no tool {name!r}; there are {', '.join(self.tools)}")
        try:
            given = json.loads(arguments or "{}")
        except ValueError:
            given = None
        if not isinstance(given, dict):
            return self._failed(f"the arguments of {name} are no JSON object")
        if not self._may_run(name):
            return DENIED
        began_s = time.monotonic()
        try:
            with self._waiting(name, began_s):
                said = self._servers.call(tool, given)
        except CallFailed as problem:
            return self._failed(f"{name} failed: {problem}")
        shown = said if len(said) <= _SHOWN else f"{said[:_SHOWN]}… ({format_count(len(said))} characters)"
        self._screen.say("  ← " + shown.rstrip().replace("\n", "\n    "))
        return said

    def _failed(self, what: str) -> str:
        self._screen.tell(f"  ← {what}")
        return f"Error: {what}"

    def _waiting(self, name: str, began_s: float) -> AbstractContextManager[None]:
        def line() -> str:
            return f"  {name}: {time.monotonic() - began_s:.0f} s, Ctrl-C stops it"

        return self._screen.status(line, plain_every_s=10.0)

    def _may_run(self, name: str) -> bool:
        """Whether a call is allowed; the user is asked, once for each tool, where there is somebody to ask."""
        if self._is_allowed(name):
            return True
        if not can_ask():
            self._screen.tell(f"  {name} is not called: nobody can be asked here; --mcp-allow {name}, or --yes for all")
            return False
        answer = asked(QUESTION.format(name)).strip().lower()[:1]
        if answer == "y":
            self._allowed.add(name)
        return answer in ("y", "o")

    def _is_allowed(self, name: str) -> bool:
        return self._everything or not self._allowed.isdisjoint({name, self.tools[name].server.name})


@dataclass
class Results:
    """Messages of role tool, one for each call, of which `most` characters each are for the model.

    `stopped`: the user did not want to wait for all of them.
    """

    most: int
    whole: list[Message] = field(default_factory=list)
    stopped: bool = False

    @property
    def messages(self) -> list[Message]:
        """They as the model is to read them."""
        return self.cut(self.most)

    def cut(self, most: int) -> list[Message]:
        """The same with no more than so many characters each, and how many there were more."""
        return [_cut(result, min(most, self.most)) for result in self.whole]


def _cut(result: Message, most: int) -> Message:
    said = str(result["content"])
    if len(said) <= most:
        return result
    return {**result, "content": f"{said[:most]}\n[{format_count(len(said) - most)} more characters are left out]"}


def _plain(name: str) -> str:
    """A tool's name as every template and grammar can write it."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", name)[:_LONGEST_NAME]


def _parameters(tool: ServerTool) -> list[str]:
    found = tool.schema.get("properties")
    return [*found] if isinstance(found, dict) else []
