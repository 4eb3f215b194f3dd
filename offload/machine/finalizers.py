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
_due: list[Callable[[], object]] = []  # each does something once: when its owner is collected, or at exit


def close_when_collected(owner: object, close: Callable[[], None]) -> None:
    """Call `close`, which must not refer to `owner`, soon after `owner` is collected, at the latest at Python's end."""
    _closer()
    _due.append(weakref.finalize(owner, _found.put, close))


@cache
def _closer() -> threading.Thread:
    thread = threading.Thread(target=_close_found, name="closer", daemon=True)
    thread.start()
    atexit.register(_end, thread)
    return thread


def _close_found() -> None:
    for close in iter(_found.get, None):
        close()


def _end(thread: threading.Thread) -> None:
    # weakref's own exit may come later: torch has finalizers before us. A thread that still reads then ends in a crash.
    for close in _due:
        close()
    _found.put(None)
    thread.join()
