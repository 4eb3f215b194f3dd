"""The loop of every interactive command: read a line, run or answer it, load another model on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from cli.chat.engines import ChatEngine
from cli.chat.session import Session
from cli.chat.slash import COMMANDS, obey
from cli.shared.errors import INTERRUPTED, REFUSALS, TERMINATED, explain
from cli.shared.options import EngineOptions
from cli.terminal.interrupts import AGAIN_S
from cli.terminal.lines import Lines, open_lines
from cli.terminal.screen import Screen

AnyEngine = TypeVar("AnyEngine", bound=ChatEngine)


def converse(
    options: EngineOptions,
    screen: Screen,
    opened: Callable[[EngineOptions], AbstractContextManager[AnyEngine]],
    *,
    history: bool,
    begin: Callable[[AnyEngine, EngineOptions, Session | None], Session],
) -> int:
    """Talk until the user leaves; returns the exit code.

    `begin` makes a session from an engine and, after /model or /drafter, from the session that asked for it.
    """
    session: Session | None = None
    lines: Lines | None = None
    while True:
        try:
            with opened(options) as engine:
                session = begin(engine, options, session)
                if lines is None:
                    lines = open_lines(screen, COMMANDS, history=history)
                    screen.say(lines.hint)
                try:
                    _talk(session, lines)
                finally:
                    session.leave()
        except REFUSALS as refusal:
            if session is None or session.options == options:
                raise
            screen.tell(explain(refusal))
            options = session.options
            continue
        if session.switch is None:
            return session.last.exit_code if session.last and session.last.exit_code == TERMINATED else 0
        options = session.switch


def _talk(session: Session, lines: Lines) -> None:
    while not session.leaving and session.switch is None:
        try:
            line = lines.read()
        except KeyboardInterrupt:
            abandoned_s = session.last.abandoned_s if session.last else None
            if abandoned_s is not None and time.monotonic() - abandoned_s < AGAIN_S:  # the third press of a row
                raise SystemExit(INTERRUPTED) from None
            session.screen.tell("(Ctrl-D or /exit to leave)")
            continue
        if line is None:
            break
        if line.startswith("/") and not line.startswith("//"):
            obey(session, line)
        elif line.strip():
            session.send(line.removeprefix("/"))
        session.keep()
