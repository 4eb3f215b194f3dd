"""The engine's libraries, imported without what they bring along and nothing here asks for: a sooner start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

UNUSED = (
    "hqq",
    "scipy",
    "trio",
)  # imported where installed: for torch's compiler, solvers for training, another event loop


@cache
def _first() -> bool:
    """Whether transformers was not loaded when this was first asked: it looks once for what is installed."""
    return "transformers" not in sys.modules


@contextmanager
def lean_imports() -> Iterator[None]:
    """For the length of the block UNUSED look as if they were not installed, unless they are loaded already.

    Nothing is hidden from a transformers that was loaded outside, and may have found them. Garbage is not collected
    meanwhile: imports leave next to none, and looking for it takes a sixth of their time.
    """
    hidden = [name for name in UNUSED if name not in sys.modules] if _first() else []
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is the import system's own word for it
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        for name in hidden:
            del sys.modules[name]
