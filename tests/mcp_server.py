"""A server of tools for tests, through the official package: `python tests/mcp_server.py [PLACE_OF_ITS_PROCESS_ID]`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import mcp.types as types
from mcp.server.mcpserver import MCPServer

server = MCPServer("files")


def read_file(path: str) -> types.CallToolResult:
    """Read a file.

    There is one.
    """
    if path == "a.txt":
        return types.CallToolResult(content=[types.TextContent(text="The file is empty")])
    return types.CallToolResult(content=[types.TextContent(text=f"{os.environ['SAYS']}: missing")], is_error=True)


def wait(seconds: float, begun: str = "") -> str:
    """Answer late."""
    if begun:
        Path(begun).touch()
    time.sleep(seconds)
    return "late"


def picture() -> types.CallToolResult:
    """Draw."""
    image = types.ImageContent(data="AAAA", mime_type="image/png")
    linked = types.ResourceLink(name="the plan", uri="file:///plan")
    return types.CallToolResult(content=[image, linked])


for function in (read_file, wait, picture):
    server.add_tool(function)

if __name__ == "__main__":
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(str(os.getpid()))
    server.run()
