"""Where words go: the answer to stdout, everything else to stderr, and one live line that leaves no trace.

Knows terminals, not models.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len

from cli.wrap import WordWrap

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
        self._folds = sys.stderr.isatty()
        self._obeyed = sys.stdout.isatty()  # whether something would obey the control codes of an answer
        self._wrap = WordWrap() if sys.stdout.isatty() and capable else None
        self._line_open = False
        self._painted = False
        # Re-entrant: a signal may arrive while this very thread is writing.
        self._lock = threading.RLock()

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def write(self, text: str) -> None:
        """Print part of an answer, at once."""
        if not text:
            return
        self._line_open = not text.endswith("\n")
        if self._obeyed:
            text = text.translate(_VISIBLE)
        with self._lock:
            self._erase()
            sys.stdout.write(self._wrap.feed(text, self.width) if self._wrap else text)
            sys.stdout.flush()

    def end_line(self) -> None:
        """End the answer's last line unless it has ended."""
        if self._line_open:
            self.write("\n")

    def say(self, line: str) -> None:
        """Print a remark that -q silences."""
        if not self.quiet:
            line = fold(line, self.width) if self._folds else line
            self.tell(f"{_DIM}{line}{_PLAIN}" if self.colour else line)

    def tell(self, line: str) -> None:
        """Print something the user must see."""
        with self._lock:
            self._erase()
            print(line, file=sys.stderr, flush=True)

    def title(self, text: str) -> None:
        """Name the terminal's window, where there is one."""
        self._signal(f"\x1b]0;specexec {text}\x07")

    def ring(self) -> None:
        """Call somebody who may be looking elsewhere."""
        self._signal("\x07")

    def copy(self, text: str) -> bool:
        """Put text on the clipboard through the terminal (OSC 52), also over ssh; False where there is no terminal."""
        self._signal(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")
        return self.live

    def _signal(self, code: str) -> None:
        """Something for the terminal itself; it moves nothing and leaves no trace."""
        if self.live:
            with self._lock:
                sys.stderr.write(code)
                sys.stderr.flush()

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
            with _keys_unseen():
                yield
        finally:
            done.set()
            timer.join()
            with self._lock:
                self._erase()

    def _paint(self, line: str, done: threading.Event) -> None:
        shown = line[: self.width - 1]
        with self._lock:
            if done.is_set():
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


def fold(text: str, width: int) -> str:
    """Text of one line broken between words, the continuation set in; pictures of several lines stay as they are."""
    if "\n" in text or cell_len(text) < width:
        return text
    return textwrap.fill(text, width - 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


@contextmanager
def _keys_unseen() -> Iterator[None]:
    """Keys pressed while the engine works are kept for the next prompt, but do not show up inside the answer."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
