"""The terminal while the engine works: keys are not echoed, the cursor is hidden, Ctrl-Z restores both."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO, TypeAlias

Modes: TypeAlias = list[Any]  # as termios gives and takes them

_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"


@contextmanager
def foreground(terminal: TextIO | None, away: Callable[[], None]) -> Iterator[None]:
    """For the length of the block keys are kept for the next prompt instead of appearing in the answer.

    `terminal`, if there is one, shows no cursor. When the user suspends the program, `away` is called first.
    """
    if sys.platform == "win32":
        yield
        return
    before = _silence()
    _put(terminal, _HIDE)

    def suspend(_signal: int, _frame: FrameType | None) -> None:
        away()
        _put(terminal, _SHOW)
        _restore(before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # stopped here until SIGCONT
        signal.signal(signal.SIGTSTP, suspend)
        _silence()
        _put(terminal, _HIDE)

    ours = threading.current_thread() is threading.main_thread() and terminal is not None
    previous = signal.signal(signal.SIGTSTP, suspend) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTSTP, previous)
        _put(terminal, _SHOW)
        _restore(before)


def _silence() -> Modes | None:
    """Let keys go unseen; what was before."""
    if not sys.stdin.isatty():
        return None
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    return before


def _restore(before: Modes | None) -> None:
    if before is not None:
        import termios

        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _put(terminal: TextIO | None, code: str) -> None:
    if terminal is not None:
        terminal.write(code)
        terminal.flush()
