"""Closing what the garbage collector finds, in a thread of its own.

A finalizer runs wherever memory happens to be asked for: on any thread, a reader's own among them, inside any lock.
Closing waits for a read in progress; a finalizer that waits can wait for itself.
"""

import atexit
import threading
import weakref
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue

# The one queue of the library into which may be put from inside itself.
_found: SimpleQueue[Callable[[], None] | None] = SimpleQueue()


def close_when_collected(owner: object, close: Callable[[], None]) -> None:
    """Call `close`, which must not refer to `owner`, soon after `owner` is collected, at the latest at Python's end."""
    _closer()
    weakref.finalize(owner, _found.put, close)


@cache
def _closer() -> threading.Thread:
    thread = threading.Thread(target=_close_found, name="closer", daemon=True)
    thread.start()
    # Before the first finalizer exists: at exit these run first, and what they put is still closed.
    atexit.register(_end, thread)
    return thread


def _close_found() -> None:
    for close in iter(_found.get, None):
        close()


def _end(thread: threading.Thread) -> None:
    _found.put(None)
    thread.join()
