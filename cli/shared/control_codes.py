"""Control codes in text of others (models, files, the Hub): shown on the terminal, never executed by it.

Everything that a command prints goes through `echo`; a Screen does the same for what it draws. A pipe gets words and
lines as they are.
"""

from __future__ import annotations

import shutil
import sys

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
# C1 controls, which terminals obey as they do Esc and a letter, and marks that reorder a line (Unicode's UAX 9).
_NAMED = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_VISIBLE = _PICTURES | {code: f"<U+{code:04X}>" for code in _NAMED}


def visible(text: str) -> str:
    """Text without control codes: each is a picture or a number."""
    return text.translate(_VISIBLE)


def echo(text: object = "", *, err: bool = False, nl: bool = True, folded: bool = False) -> None:
    """Print at once. On a terminal remarks (`err`) and what is `folded` break between words, not where it is full."""
    stream = sys.stderr if err else sys.stdout
    shown = str(text)
    if stream.isatty():
        shown = visible(shown)
        if err or folded:
            from cli.shared.wrap import fold  # what counts cells is slow to import

            shown = fold(shown, shutil.get_terminal_size().columns)
    print(shown, file=stream, end="\n" if nl else "", flush=True)
