"""The algorithm: trees of guesses, verified by one sweep of any causal language model, exactly.

    import specexec

    with specexec.load("demo") as llm:
        print(llm.generate([{"role": "user", "content": "How does specexec work?"}]).text)

Importing the package is light: torch comes with the first `load`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from specexec.errors import SpecexecError
from specexec.sampling import SamplingParams
from specexec.stats import Burst, Completion, Progress
from specexec.work import Continuation, Failure, Likelihood, Request

if TYPE_CHECKING:
    from specexec.batch import Batch
    from specexec.compose import load
    from specexec.conversation import Conversation
    from specexec.engine import Engine

__all__ = [
    "Batch",
    "Burst",
    "Completion",
    "Continuation",
    "Conversation",
    "Engine",
    "Failure",
    "Likelihood",
    "Progress",
    "Request",
    "SamplingParams",
    "SpecexecError",
    "load",
]

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as offload does, before torch is loaded

_LATE = {
    "Batch": "specexec.batch",
    "Conversation": "specexec.conversation",
    "Engine": "specexec.engine",
    "load": "specexec.compose",
}


def __getattr__(name: str) -> object:
    """Names that cost an import of torch arrive when they are asked for."""
    if name not in _LATE:
        raise AttributeError(f"module 'specexec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATE[name]), name)
