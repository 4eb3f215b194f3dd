"""Where words go: the answer to stdout, everything else to stderr, and one live line that leaves no trace.

Knows terminals, not models.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len

TICK_S = 0.1

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# Index, then up: makes sure that a line exists below the cursor, without moving it.
_ROOM_BELOW = "\x1bD\x1b[A"
_BELOW, _BACK = "\x1b7\x1b[B\r\x1b[2K", "\x1b8"
# A model may write any character; on a terminal its control codes are shown, not obeyed.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


class Screen:
    """The two streams of one run. Live lines and colours only where a terminal can show them."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        capable = os.environ.get("TERM", "") != "dumb"
        self.live = sys.stderr.isatty() and capable and not quiet
        self.colour = sys.stderr.isatty() and capable and not os.environ.get("NO_COLOR")
        self._answers_on_terminal = sys.stdout.isatty()
        self._column = 0
        self._painted = False
        # Re-entrant: a signal may arrive while this very thread is writing.
        self._lock = threading.RLock()

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def write(self, text: str) -> None:
        """Print part of an answer, at once."""
        if self._answers_on_terminal:
            text = text.translate(_VISIBLE)
        with self._lock:
            self._erase()
            sys.stdout.write(text)
            sys.stdout.flush()
            self._follow(text)

    def end_line(self) -> None:
        """End the answer's last line unless it has ended."""
        if self._column:
            self.write("\n")

    def say(self, line: str) -> None:
        """Print a remark that -q silences."""
        if not self.quiet:
            self.tell(f"{_DIM}{line}{_PLAIN}" if self.colour else line)

    def tell(self, line: str) -> None:
        """Print something the user must see."""
        with self._lock:
            self._erase()
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def status(self, line: Callable[[], str], *, plain_every_s: float | None = None) -> Iterator[None]:
        """Keep one dim line below the text, refreshed from a timer thread until the block ends.

        Where lines cannot be live, one is printed every `plain_every_s` seconds, if that is given.
        """
        if self.quiet or not (self.live or plain_every_s):
            yield
            return
        done = threading.Event()

        def refresh() -> None:
            while not done.wait(TICK_S if self.live else plain_every_s):
                if self.live:
                    self._paint(line(), done)
                else:
                    self.say(line())

        if self.live:
            self._paint(line(), done)
        timer = threading.Thread(target=refresh, name="status", daemon=True)
        timer.start()
        try:
            yield
        finally:
            done.set()
            timer.join()
            with self._lock:
                self._erase()

    def _paint(self, line: str, done: threading.Event) -> None:
        shown = line[: self.width - 1]
        with self._lock:
            # At the right edge the terminal owes a line break, and saving the cursor would lose it.
            if done.is_set() or self._column >= self.width:
                return
            dim, plain = (_DIM, _PLAIN) if self.colour else ("", "")
            sys.stderr.write(f"{_ROOM_BELOW}{_BELOW}{dim}{shown}{plain}{_BACK}")
            sys.stderr.flush()
            self._painted = True

    def _erase(self) -> None:
        if self._painted:
            sys.stderr.write(_BELOW + _BACK)
            sys.stderr.flush()
            self._painted = False

    def _follow(self, text: str) -> None:
        """Remember in which column the text has ended."""
        before, newline, last = text.rpartition("\n")
        start = 0 if newline or before else self._column
        for character in last.expandtabs(8):
            width = cell_len(character)
            start = width if start + width > self.width else start + width
        self._column = start
