"""Waiting for what other threads and processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_s = 60.0
"""A busy machine may take long over everything; what never comes is an error nevertheless."""


def until(holds: Callable[[], object], seconds: float = PATIENCE_s) -> None:
    """Return as soon as it holds."""
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.002)
