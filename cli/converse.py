"""The loop of every interactive command: read a line, obey it or answer it."""

from __future__ import annotations

from cli.errors import TERMINATED
from cli.lines import open_lines
from cli.session import Session
from cli.slash import COMMANDS, obey


def converse(session: Session, *, history: bool) -> int:
    """Talk until the user leaves; returns the exit code."""
    lines = open_lines(session.screen, list(COMMANDS), history=history)
    session.screen.say(lines.hint)
    while not session.leaving:
        try:
            line = lines.read()
        except KeyboardInterrupt:
            session.screen.tell("(Ctrl-D or /exit to leave)")
            continue
        if line is None:
            break
        if line.startswith("/") and not line.startswith("//"):
            obey(session, line)
        elif line.strip():
            session.send(line.removeprefix("/"))
        session.keep()
    return session.last.exit_code if session.last and session.last.exit_code == TERMINATED else 0
