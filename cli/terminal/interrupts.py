"""Ctrl-C and SIGTERM while the engine works: the first stops after a sweep, later ones at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from cli.shared.errors import INTERRUPTED, TERMINATED

AGAIN_S = 2.0
INSIST_S = 0.1


class Interrupts:
    """While open: the first Ctrl-C asks the engine to stop, a second within two seconds abandons the sweep
    (KeyboardInterrupt), a third leaves the program. SIGTERM asks to stop too and is remembered in `exit_code`.

    A press may come while Python runs a finalizer, where every exception is dropped; `check` raises it again.
    """

    def __init__(self, stop: Callable[[], None], acknowledge: Callable[[], None]) -> None:
        self.exit_code = 0
        self._stop = stop
        self._acknowledge = acknowledge
        self._presses = 0
        self._last_s = 0.0
        self._dropped = False
        self._over = threading.Event()
        self._insisting: threading.Thread | None = None

    def __enter__(self) -> Interrupts:
        self._before = {
            signal.SIGINT: signal.signal(signal.SIGINT, self._press),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminate),
        }
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def check(self) -> None:
        """Raises KeyboardInterrupt if one was dropped."""
        if self._dropped:
            self._dropped = False
            raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        if self._insisting is not None:
            self._insisting.join()
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, _signal: int, _frame: FrameType | None) -> None:
        """What a first Ctrl-C does, however often."""
        self.exit_code = self.exit_code or INTERRUPTED
        self._ask()

    def _press(self, _signal: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        self._presses = self._presses + 1 if now_s - self._last_s < AGAIN_S else 1
        self._last_s = now_s
        self.exit_code = self.exit_code or INTERRUPTED
        if self._presses == 1:
            self._ask()
        elif self._presses == 2:
            raise KeyboardInterrupt
        else:
            raise SystemExit(INTERRUPTED)

    def _ask(self) -> None:
        """Ask the engine to stop until it has: one that has not begun yet forgets what it was asked before."""
        self._stop()
        self._acknowledge()
        if self._insisting is None:
            insisting = threading.Thread(target=self._insist, name="stop", daemon=True)
            insisting.start()
            self._insisting = insisting  # only now: a second press may come in between, and what never ran has no end

    def _insist(self) -> None:
        while not self._over.wait(INSIST_S):
            self._stop()

    def _unraisable(self, dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            self._dropped = True
        else:
            self._hook(dropped)

    def _terminate(self, _signal: int, _frame: FrameType | None) -> None:
        if self.exit_code == TERMINATED:  # asked twice: the sweep does not end by itself
            raise SystemExit(TERMINATED)
        self.exit_code = TERMINATED
        self._ask()
