"""What decides how fast arithmetic is here: the code that does it, torch, the machine and its threads. No torch."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

import offload
import specexec
from offload.machine.identity import machine

# Who multiplies, who unpacks, on which threads, and how both are measured.
_PACKAGE = Path(offload.__file__).parent
_QUANTIZED = _PACKAGE / "checkpoint" / "quantized"
ARITHMETIC = (
    *sorted((Path(specexec.__file__).parent / "model" / "linears").glob("*.py")),
    *(
        _PACKAGE / "machine" / f"{name}.py"
        for name in ("thread_pool", "integer_products", "integer_loops", "integer_tiles")
    ),
    *(_QUANTIZED / f"{name}.py" for name in ("bitsandbytes_4bit", "int8", "mxfp4")),
    *(_QUANTIZED / "arithmetic" / f"{name}.py" for name in ("pieces", "group_codes", "row_codes")),
    _PACKAGE / "measure.py",
)


def conditions(device: str) -> dict[str, str]:
    """By name, for `cpu` or `cuda`: speeds that were measured when one of them was another say nothing."""
    code = hashlib.sha256(b"".join(file.read_bytes() for file in ARITHMETIC)).hexdigest()[:8]
    here = {"specexec": f"{version('specexec')} ({code})", "torch": version("torch")} | machine(device)
    if device == "cpu":
        here["threads"] = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    return here
