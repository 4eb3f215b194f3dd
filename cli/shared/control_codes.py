"""Control codes in text of others (models, files, the Hub): shown on the terminal, never executed by it.

Everything that a command prints goes through `echo`; a Screen does the same for what it draws. A pipe gets the words as
they are.
"""

from __future__ import annotations

import sys

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
# C1 controls, which terminals obey as they do Esc and a letter, and marks that reorder a line (Unicode's UAX 9).
_NAMED = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_VISIBLE = _PICTURES | {code: f"<U+{code:04X}>" for code in _NAMED}


def visible(text: str) -> str:
    """Text without control codes: each is a picture or a number."""
    return text.translate(_VISIBLE)


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print at once."""
    stream = sys.stderr if err else sys.stdout
    shown = str(text)
    print(visible(shown) if stream.isatty() else shown, file=stream, end="\n" if nl else "", flush=True)
