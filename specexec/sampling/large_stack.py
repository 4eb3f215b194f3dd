"""Calls with room for deep recursion, as deep as a grammar nests: a stack that is full ends the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from specexec.errors import BadGrammar

Result = TypeVar("Result")

# A schema of 24 kB whose definitions refer to each other in a row takes more than the usual 8 MiB. With 256 MiB
# llguidance's own limits come first. Memory that is not touched is not taken.
_STACK_B = 256 << 20
_starting = threading.Lock()  # the size is that of whichever thread starts next


def on_large_stack(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, in a thread of its own; BadGrammar where there cannot be one."""
    done = Future[Result]()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as problem:
            done.set_exception(problem)

    thread = threading.Thread(target=run, name="grammar", daemon=True)
    with _starting:
        before = threading.stack_size(_STACK_B)
        try:
            thread.start()
        except RuntimeError as problem:  # address space can be limited
            raise BadGrammar(
                f"a grammar is read with a stack of {_STACK_B >> 20} MiB, which this process may not have.",
                hint="allow it more memory (ulimit -v), or leave the grammar out.",
            ) from problem
        finally:
            threading.stack_size(before)
    return done.result()
