"""Lines at the end of a terminal that are repainted in place and erased at the end. Knows nothing of their meaning.

The cursor rests where the region begins, always at the left edge: whatever a resize makes of the lines below it,
erasing from the cursor to the end of the screen removes all of them and nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TextIO

_CLEAR_BELOW, _CLEAR_RIGHT = "\x1b[J", "\x1b[K"
# A terminal may be narrower than it says for a moment (tmux reports a resize late): cut there rather than wrap.
_CUT, _WRAP = "\x1b[?7l", "\x1b[?7h"


class Region:
    """One per terminal. Lines must be narrower than it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._painted: list[str] = []
        self._width = 0

    def paint(self, lines: Sequence[str]) -> None:
        """Show these lines instead of the last ones; the end of them where the screen is too low for all."""
        width, height = shutil.get_terminal_size()
        shown = list(lines[-(height - 1) :])
        if shown == self._painted and width == self._width:
            return
        if width != self._width:  # what a resize has folded must go first: tmux would join the new lines to it
            self.erase()
        up = f"\x1b[{len(shown) - 1}A" if len(shown) > 1 else ""
        text = f"{_CLEAR_RIGHT}\r\n".join(shown)
        self._put(f"\r{_CUT}{text}{_CLEAR_BELOW}{_WRAP}{up}\r")
        self._painted, self._width = shown, width

    def erase(self) -> None:
        """Take the lines away; text may be printed."""
        if self._painted:
            self._put(f"\r{_CLEAR_BELOW}")
            self._painted = []

    def _put(self, codes: str) -> None:
        self._stream.write(codes)
        self._stream.flush()
