"""The algorithm: trees of guesses, verified by one sweep of any causal language model, exactly.

    import specexec

    with specexec.load("demo") as llm:
        print(llm.generate([{"role": "user", "content": "How does specexec work?"}]).text)

Importing the package is light: torch comes with the first `load`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from specexec.compose.load_options import LoadOptions
from specexec.compose.progress import LoadProgress
from specexec.engine.request_types import Continuation, Failure, Likelihood, Request
from specexec.errors import SpecexecError
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Completion, Progress

if TYPE_CHECKING:
    from specexec.compose.load import load
    from specexec.engine.batch import Batch
    from specexec.engine.engine import Engine
    from specexec.text.conversation import Conversation

__all__ = [
    "Batch",
    "Burst",
    "Completion",
    "Continuation",
    "Conversation",
    "Engine",
    "Failure",
    "Likelihood",
    "LoadOptions",
    "LoadProgress",
    "Progress",
    "Request",
    "SamplingParams",
    "SpecexecError",
    "load",
]

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as offload does, before torch is loaded

_LATE = {
    "Batch": "specexec.engine.batch",
    "Conversation": "specexec.text.conversation",
    "Engine": "specexec.engine.engine",
    "load": "specexec.compose.load",
}


def __getattr__(name: str) -> object:
    """Names that cost an import of torch arrive when they are asked for."""
    if name not in _LATE:
        raise AttributeError(f"module 'specexec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATE[name]), name)
