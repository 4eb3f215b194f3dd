"""Where output goes: the answer to stdout, everything else to stderr, live lines below both, erased when done.

Knows terminals, not models. Finished lines of an answer are printed once and never again; its last line, and with
Markdown its last block, is part of the live region until it is finished.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cli.shared.control_codes import visible
from cli.shared.wrap import fold, wrapped
from cli.terminal.foreground import foreground
from cli.terminal.prose import Dimmed, PlainProse, Prose
from cli.terminal.region import Region

TICK_S = 0.125

# Terminals with a bar of their own; others would show the sequence as a notification, again and again.
_BARS = {"WT_SESSION": None, "ConEmuANSI": "ON", "TERM_PROGRAM": "ghostty"}

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Bar(Protocol):
    """What tqdm draws."""

    n: float
    total: float | None

    def update(self, n: float | None = 1) -> object: ...


def watched(bar: Bar, screen: Screen) -> Callable[[int], object]:
    """Moves a bar, and the terminal's own with it."""

    def advance(more: int) -> None:
        bar.update(more)
        share = bar.n / (bar.total or 1)
        screen.progress(share if share < 1 else None)

    return advance


class Screen:
    """The two streams of one run. Live lines and colours only where a terminal shows them, none if `plain`."""

    def __init__(self, *, quiet: bool = False, plain: bool = False) -> None:
        self.quiet = quiet
        capable = os.environ.get("TERM", "") != "dumb" and not plain
        self.live = sys.stderr.isatty() and capable and not quiet
        shown = (sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))) and capable
        self.colour = shown and not os.environ.get("NO_COLOR")
        self._has_bar = any(os.environ.get(name) and value in (None, os.environ[name]) for name, value in _BARS.items())
        self.markdown = True
        self._every_s = 10.0 if plain else None  # where lines cannot be live, how often a sentence says how far we are
        self._watched = sys.stderr.isatty()  # whether something would obey the control codes of a remark
        self._obeyed = sys.stdout.isatty()  # whether something would obey the control codes of an answer
        self.paints = sys.stdout.isatty() and capable  # whether what is not finished may still change
        self._region = Region(sys.stdout if self.paints else sys.stderr)
        self._status: Callable[[], str] | None = None
        self._prose: Prose | None = None
        self._thinking = False
        self._line_open = False
        # Re-entrant: a signal may arrive while this thread is writing.
        self._lock = threading.RLock()

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def write(self, text: str, *, thought: bool = False) -> None:
        """Print part of an answer, or of the thoughts before it, at once; through a pipe goes the answer alone."""
        if not text or (thought and self.quiet and not self._obeyed):
            return
        if thought != self._thinking:
            self.end_line()
            self._thinking = thought
        if self._obeyed:
            text = visible(text)
        if not self.paints:
            self._line_open = not text.endswith("\n")
            self._print(text)
            return
        with self._lock:
            self._prose = self._prose or self._new_prose()
            self._print_lines(self._prose.feed(text, self.width - 1))
            self._repaint()

    def write_line(self, line: str) -> None:
        """Print a line of an answer that is no Markdown."""
        self.end_line()
        markdown, self.markdown = self.markdown, False
        self.write(line)
        self.end_line()
        self.markdown = markdown

    def end_line(self) -> None:
        """End the answer's last line unless it has ended."""
        with self._lock:
            if self._prose is not None:
                prose, self._prose = self._prose, None
                self._print_lines(prose.end(self.width - 1))
            if self._line_open:
                self._line_open = False
                self._print("\n")

    def say(self, line: str) -> None:
        """Print a remark that -q silences."""
        if not self.quiet:
            line = self._seen(line)
            self._remark(f"{_DIM}{line}{_PLAIN}" if self.colour else line)

    def tell(self, text: str, *, folded: bool = True) -> None:
        """Print something the user must see, with lines of the terminal's width or, not `folded`, as they are."""
        self._remark(self._seen(text, folded))

    def _seen(self, text: str, folded: bool = True) -> str:
        if not self._watched:
            return text
        return fold(visible(text), self.width) if folded else visible(text)

    def _remark(self, line: str) -> None:
        with self._lock:
            self._region.erase()
            print(line, file=sys.stderr, flush=True)

    def title(self, text: str) -> None:
        """Name the terminal's window, where there is one."""
        self._signal(f"\x1b]0;specexec {text}\x07")

    def progress(self, share: float | None) -> None:
        """Let the terminal's own bar show how much is done, None: nothing any more. Only terminals that have one."""
        if self._has_bar:
            self._signal("\x1b]9;4;0;0\x07" if share is None else f"\x1b]9;4;1;{round(100 * share)}\x07")

    def ring(self) -> None:
        """Signal to a user who may look elsewhere."""
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
    def status(self, lines: Callable[[], str], *, plain_every_s: float | None = None) -> Iterator[None]:
        """Keep a few dim lines below the text, refreshed from a timer thread until the block ends.

        Where lines cannot be live, they are printed every `plain_every_s` seconds, if that is given.
        """
        every_s = TICK_S if self.live else self._every_s or plain_every_s
        if self.quiet or every_s is None:
            yield
            return
        done = threading.Event()

        def refresh() -> None:
            while not done.wait(every_s):
                if self.live:
                    self._repaint()
                else:
                    self.say("; ".join(line.strip() for line in lines().split("\n")))

        self._status = lines if self.live else None
        self._repaint()
        timer = threading.Thread(target=refresh, name="status", daemon=True)
        timer.start()
        try:
            with foreground(sys.stderr if self.live else None, self._away):
                yield
        finally:
            done.set()
            timer.join()
            with self._lock:
                self._status = None
                self._region.erase()
                self._repaint()

    def _away(self) -> None:
        """The shell is about to write where our lines are."""
        with self._lock:
            self._region.erase()

    def _new_prose(self) -> Prose:
        plain = PlainProse()
        if self._thinking:
            return Dimmed(plain, _DIM, _PLAIN) if self.colour else plain
        if not self.markdown:
            return plain
        from cli.terminal.markdown import MarkdownProse

        return MarkdownProse(colour=self.colour)

    def _print_lines(self, lines: list[str]) -> None:
        if lines:
            self._print("".join(f"{line}\n" for line in lines))

    def _print(self, text: str) -> None:
        stream = sys.stderr if self._thinking and not self._obeyed else sys.stdout
        with self._lock:
            self._region.erase()
            stream.write(visible(text) if stream is sys.stderr and self._watched else text)
            stream.flush()

    def _repaint(self) -> None:
        with self._lock:
            width = self.width - 1
            lines = self._prose.tail(width) if self._prose is not None else []
            if self._status is not None:
                dim, plain = (_DIM, _PLAIN) if self.colour else ("", "")
                lines += [f"{dim}{wrapped(line, width)[0]}{plain}" for line in visible(self._status()).split("\n")]
            if lines or self._prose is not None:
                self._region.paint(lines)
