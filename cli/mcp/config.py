"""Which MCP servers are meant: names in the user's file, files of the known form `mcpServers`, addresses, commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeAlias

import click

from cli.shared.errors import BadConfig, McpFailed
from offload.machine.folders import folder_of, typed_path

Transport: TypeAlias = Literal["stdio", "http", "sse"]

# How files name a transport, and what each is here.
_TRANSPORTS: dict[str, Transport] = {"stdio": "stdio", "http": "http", "streamable-http": "http", "sse": "sse"}
_TRANSPORTS |= {"streamableHttp": "http", "streamable_http": "http"}
_ALLOWING = ("alwaysAllow", "autoApprove")
_KNOWN = {"type", "transport", "command", "args", "env", "cwd", "url", "headers", "disabled", *_ALLOWING}
# ${NAME}, ${NAME:-what else} and ${env:NAME}, as programs that read such files have them.
_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class McpServer:
    """One server: a command that is started and talked to through its standard streams, or an address.

    Without a name it goes by its own. `env` is what it gets besides the few variables that every one gets. `allowed`
    are tools that need no consent.
    """

    name: str = ""
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    transport: Transport = "stdio"
    allowed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The address, or the command as it would be typed."""
        return self.url or shlex.join([self.command, *self.args])


def user_servers() -> Path:
    """The user's own file of servers, whether it exists or not."""
    return folder_of("config") / "mcp.json"


def meant(words: Items[str]) -> list[McpServer]:
    """The servers of --mcp, each once. Raises BadConfig, McpFailed."""
    found: list[McpServer] = []
    for server in (one for word in words for one in _meant(word)):
        if server not in found:
            found.append(server)
    return found


def _meant(word: str) -> list[McpServer]:
    if re.match(r"https?://", word):
        return [McpServer(url=word, transport="http")]
    if word.endswith(".json") and typed_path(word).is_file():
        path = typed_path(word)
        return [_filled(name, given, path) for name, given in _servers_of(path) if not given.get("disabled")]
    file = user_servers()
    known = dict(_servers_of(file)) if file.is_file() else {}
    if word in known:
        return [_filled(word, known[word], file)]
    try:
        command, *args = shlex.split(word) or [""]
    except ValueError as problem:
        raise click.UsageError(f"--mcp {word!r}: {problem}.") from None
    if shutil.which(command) is None:
        near = get_close_matches(word, known, n=1)
        listed = f"{file} names {', '.join(known)}." if known else f"{file} names none."
        raise McpFailed(
            f"there is no MCP server {word!r}: no such command, address or file.", why=listed,
            hint=f"--mcp {near[0]}" if near else "--mcp NAME, FILE.json, https://… or 'COMMAND AND ITS ARGUMENTS'",
        )  # fmt: skip
    return [McpServer(command=command, args=tuple(args))]


def _servers_of(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """What a file says of each of its servers. Raises BadConfig."""
    try:
        read = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as problem:
        raise BadConfig(f"{path} cannot be read as JSON: {problem}.") from None
    servers = read.get("mcpServers", read.get("servers")) if isinstance(read, dict) else None
    if not isinstance(servers, dict):
        raise BadConfig(f"{path} names no servers.", hint='{"mcpServers": {"NAME": {"command": "…", "args": []}}}')
    for name, one in servers.items():
        if not isinstance(one, dict):
            raise BadConfig(f"{path}: {name} is not an object with a command or a url.")
        yield name, one


def _filled(name: str, given: Mapping[str, object], path: Path) -> McpServer:
    """One server of a file, its variables filled in. Raises BadConfig for what cannot be meant."""

    def wrong(what: str) -> BadConfig:
        return BadConfig(f"{path}: {name}: {what}")

    def text(key: str) -> str:
        value = given.get(key, "")
        if not isinstance(value, str):
            raise wrong(f"{key} is not text.")
        return _with_variables(value, wrong)

    def texts(key: str) -> list[str]:
        value = given.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise wrong(f"{key} is not a list of texts.")
        return [_with_variables(one, wrong) for one in value]

    def table(key: str) -> dict[str, str]:
        value = given.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise wrong(f"{key} is not an object of texts.")
        return {entry: _with_variables(one, wrong) for entry, one in value.items()}

    command, url = text("command"), text("url")
    if bool(command) == bool(url):
        raise wrong("either a command or a url is needed.")
    kind = text("type") or text("transport") or ("http" if url else "stdio")
    transport = _TRANSPORTS.get(kind)
    if transport is None or (transport == "stdio") != bool(command):
        raise wrong(f"its type is {kind!r}; a command has stdio, a url http or sse.")
    unknown = [key for key in given if key not in _KNOWN]
    return McpServer(
        name, command, tuple(texts("args")), table("env"),
        typed_path(text("cwd")) if text("cwd") else None, url, table("headers"), transport,
        tuple(tool for key in _ALLOWING for tool in texts(key)),
        (f"{name}: without effect here: {', '.join(unknown)}",) if unknown else (),
    )  # fmt: skip


def _with_variables(text: str, wrong: Callable[[str], BadConfig]) -> str:
    def filled(found: re.Match[str]) -> str:
        value = os.environ.get(found[1], found[2])
        if value is None:
            raise wrong(f"the environment has no variable {found[1]}.")
        return value

    return _VARIABLE.sub(filled, text)
