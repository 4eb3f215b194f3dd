"""Esc while an answer is written. The terminal itself turns the key into a signal, so no thread has to read keys.

Esc takes the place of Ctrl-\ meanwhile. Keys that begin with it, such as arrows, bring more at once: they are dropped.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType

REST_S = 0.03  # within which the rest of a key arrives


@contextmanager
def escape_calls(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """For the length of the block Esc calls `handler`, where a terminal in front of us has such a key."""
    if find_spec("termios") is None or not sys.stdin.isatty() or not _in_front():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()

    def pressed(number: int, frame: FrameType | None) -> None:
        time.sleep(REST_S)
        if _waiting(terminal):
            termios.tcflush(terminal, termios.TCIFLUSH)
        else:
            handler(number, frame)

    before = termios.tcgetattr(terminal)
    changed = termios.tcgetattr(terminal)
    changed[3] &= ~termios.ICANON  # what arrives is seen before a line is whole
    changed[6][termios.VQUIT] = b"\x1b"
    handled = signal.signal(signal.SIGQUIT, pressed)
    termios.tcsetattr(terminal, termios.TCSANOW, changed)
    try:
        yield
    finally:
        if _in_front():  # from the background this would stop us; the shell has put its own settings back
            termios.tcsetattr(terminal, termios.TCSANOW, before)
        signal.signal(signal.SIGQUIT, handled)


def _waiting(terminal: int) -> int:
    """Bytes typed and not read."""
    import fcntl
    import termios

    return int(struct.unpack("i", fcntl.ioctl(terminal, termios.FIONREAD, bytes(4)))[0])


def _in_front() -> bool:
    return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
