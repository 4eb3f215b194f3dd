"""The options that name MCP servers and say what of them may be called. Imports nothing of theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import click

from cli.shared.options import RealNumber

Result = TypeVar("Result")


@dataclass(frozen=True)
class McpOptions:
    """Which servers, how long a call may take, and what needs no consent: `everything`, or what is named."""

    servers: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    everything: bool = False
    timeout_s: float = 60.0


_OPTIONS = (
    click.option("--mcp", metavar="SERVER", multiple=True,
                 help="Let the model call the tools of this MCP server: a name of mcp.json, a file like it, "
                      "an address, or a command; repeatable."),
    click.option("--mcp-allow", metavar="NAME", multiple=True,
                 help="Call this tool, or all of this server's, without asking; repeatable."),
    click.option("-y", "--yes", is_flag=True, help="Call every tool without asking."),
    click.option("--mcp-timeout", type=RealNumber(min=0, min_open=True), metavar="SECONDS",
                 default=McpOptions.timeout_s, show_default=True, help="Longest call of a tool."),
)  # fmt: skip


def mcp_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add them; the command receives one `mcp: McpOptions`."""

    @functools.wraps(command)
    def collected(
        mcp: tuple[str, ...], mcp_allow: tuple[str, ...], yes: bool, mcp_timeout: float, **rest: object
    ) -> Result:
        return command(mcp=McpOptions(mcp, mcp_allow, yes, mcp_timeout), **rest)

    decorated: Callable[..., Result] = collected
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
