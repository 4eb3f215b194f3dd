"""A prompt from the command line, with piped input before it."""

from __future__ import annotations

import sys

from specexec.errors import BadText, EmptyPrompt


def with_stdin(prompt: str) -> str:
    """The prompt with whatever was piped in put in front of it."""
    piped = "" if sys.stdin.isatty() else _read_stdin().strip("\n")
    text = "\n\n".join(part for part in (piped, prompt) if part.strip())
    if not text:
        raise EmptyPrompt("the prompt is empty.")
    return text


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise BadText("standard input is not UTF-8 text.") from None
