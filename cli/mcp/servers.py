"""Running MCP servers, through the official package `mcp` (extra `mcp`): their tools, and calls of them."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from sys import executable
from typing import TYPE_CHECKING, Any, TextIO, cast

from cli.mcp.config import McpServer
from cli.shared.errors import McpFailed, MissingExtra
from cli.shared.quantities import format_bytes

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from mcp import Client
    from mcp.types import CallToolResult, Tool

_MOST_PAGES = 100  # of tools that one server lists
_SAID_B = 2000  # of what a server wrote to its standard error: the end of it explains a failure


class CallFailed(Exception):
    """A tool gave nothing; says why, in words for the model and the user."""


@dataclass(frozen=True)
class ServerTool:
    """A tool as its server describes it."""

    server: McpServer
    name: str
    description: str
    schema: dict[str, object]
    title: str = ""


class McpServers:
    """Servers that run for the length of a block, in a thread of their own; to be used from one other thread.

    A call may take `timeout_s`. A server that is started may be downloaded first, so each of its first words may take
    `start_s`.
    """

    def __init__(self, servers: Items[McpServer], timeout_s: float, start_s: float = 120.0) -> None:
        self.servers: list[McpServer] = []
        self._asked = servers
        self.tools: list[ServerTool] = []
        self._timeout_s, self._start_s = timeout_s, start_s
        self._clients: dict[str, Client] = {}
        self._stack = ExitStack()

    def start(self, waiting: Callable[[str], AbstractContextManager[None]]) -> None:
        """Start all and list their tools; `waiting` shows what is waited for. Raises MissingExtra, McpFailed."""
        if find_spec("mcp") is None:
            hint = f"{Path(executable).name} -m pip install 'specexec[mcp]'"
            raise MissingExtra("tools of MCP servers need the package mcp, which is not installed.", hint=hint)
        from anyio.from_thread import start_blocking_portal

        # It logs every line of a server that is none of the protocol with a traceback; what fails is raised here.
        logging.getLogger("mcp").setLevel(logging.CRITICAL)
        self._portal: BlockingPortal = self._stack.enter_context(start_blocking_portal())
        for server in self._asked:
            with waiting(f"starting {server.name or server.where}…"):
                self._start(server)

    def close(self) -> None:
        """Stop those that were started, and hang up."""
        self._stack.close()

    def __enter__(self) -> McpServers:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()  # told nothing of an error in the block, which the servers' tasks would wrap in groups

    def call(self, tool: ServerTool, arguments: dict[str, object]) -> str:
        """What a tool gives, as text. Raises CallFailed, and KeyboardInterrupt once the server was told to stop."""
        client = self._clients[tool.server.name]
        running = self._portal.start_task_soon(client.call_tool, tool.name, arguments, self._timeout_s)
        try:
            result = running.result()
        except KeyboardInterrupt:
            running.cancel()
            raise
        except Exception as problem:  # of the server, of the way there, or of what it answered
            raise CallFailed(_reason(problem)) from problem
        if result.is_error:
            raise CallFailed(text_of(result) or "the tool failed and did not say why")
        return text_of(result)

    def _start(self, server: McpServer) -> None:
        from mcp import Client
        from mcp.types import Implementation

        file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (the stack closes it)
        said = cast(TextIO, self._stack.enter_context(file))
        own = Implementation(name="specexec", version=version("specexec"))
        client = Client(_transport(server, said), read_timeout_seconds=self._start_s, client_info=own)
        try:
            self._stack.enter_context(self._portal.wrap_async_context_manager(client))
            listed = self._portal.call(_listed, client)
        except Exception as problem:
            hints = {
                "stdio": f"{server.where} by itself in a terminal",
                "http": 'mcp.json with "type": "sse", if it is old',
            }
            hint = hints.get(server.transport)
            why = "\n".join(filter(None, [_reason(problem), *_last_lines(said)]))
            name = server.name or server.where
            raise McpFailed(f"the MCP server {name} cannot be used.", why=why, hint=hint) from problem
        server = replace(server, name=self._free_name(server.name or (client.server_info or own).name))
        self.servers.append(server)
        self._clients[server.name] = client
        self.tools += [
            ServerTool(server, tool.name, tool.description or "", dict(tool.input_schema), tool.title or "")
            for tool in listed
        ]

    def _free_name(self, name: str) -> str:
        numbered = (f"{name}-{number}" for number in count(2))
        return name if name not in self._clients else next(one for one in numbered if one not in self._clients)


def text_of(result: CallToolResult) -> str:
    """What a result says; of what is no text, that it is there."""
    parts = [*_texts(result)]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _texts(result: CallToolResult) -> Iterator[str]:
    for block in result.content:
        if block.type == "text":
            yield block.text
        elif block.type == "resource_link":
            yield f"[{block.name}: {block.uri}]"
        elif block.type == "resource":
            text = getattr(block.resource, "text", None)
            yield text if text is not None else f"[{block.resource.uri}: not text, left out]"
        else:
            yield f"[{block.mime_type}, {format_bytes(len(block.data) * 3 // 4)}, left out]"


async def _listed(client: Client) -> list[Tool]:
    tools, cursor = list["Tool"](), None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            break
    return tools


def _transport(server: McpServer, said: TextIO) -> AbstractAsyncContextManager[Any]:
    if server.transport == "sse":
        from mcp.client.sse import sse_client

        return sse_client(server.url, headers=dict(server.headers))
    if server.transport == "http":
        return _over_http(server)
    from mcp import StdioServerParameters, stdio_client

    started = StdioServerParameters(
        command=server.command, args=[*server.args], env=dict(server.env), cwd=server.cwd,
        encoding_error_handler="replace",
    )  # fmt: skip
    return stdio_client(started, errlog=said)


@asynccontextmanager
async def _over_http(server: McpServer) -> AsyncIterator[Any]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    # No limit on reading: calls have their own.
    timeout = httpx2.Timeout(30.0, read=None)
    async with (
        httpx2.AsyncClient(headers=dict(server.headers), timeout=timeout) as client,
        streamable_http_client(server.url, http_client=client) as streams,
    ):
        yield streams


def _reason(problem: BaseException) -> str:
    """The first error of a group, in words."""
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return str(getattr(problem, "message", "") or problem or type(problem).__name__)


def _last_lines(said: TextIO) -> list[str]:
    said.seek(0)
    return said.read()[-_SAID_B:].strip().splitlines()[-3:]
