"""A limit for code that somebody else wrote: a chat template that loops for ever must not take the program with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TEMPLATE = "<template>"  # how jinja2 names the code it makes of a template


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside a template that has used this thread's processor for so long, at its next line."""
    until_s = time.thread_time() + seconds

    def watch(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != TEMPLATE:
            return None
        if time.thread_time() > until_s:
            raise TimeoutError
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
