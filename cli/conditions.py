"""What decides how fast arithmetic is here: the code that does it, torch, the processor and its threads. No torch."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import offload
import specexec
from offload.hardware import gpus

# Who multiplies, who unpacks, on which threads, and how both are measured.
ARITHMETIC = (
    Path(specexec.__file__).parent / "widened.py",
    Path(offload.__file__).parent / "crew.py",
    Path(offload.__file__).parent / "quant.py",
    Path(offload.__file__).parent / "probe.py",
)


def conditions(device: str) -> dict[str, str]:
    """By name, for `cpu` or `cuda`: speeds that were measured when one of them was another say nothing."""
    code = hashlib.sha256(b"".join(file.read_bytes() for file in ARITHMETIC)).hexdigest()[:8]
    shared = {"specexec": f"{version('specexec')} ({code})", "torch": version("torch")}
    if device == "cpu":
        threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
        return shared | {"processor": _processor(), "threads": threads}
    return shared | {"GPU": next((gpu.name for gpu in gpus()), "none")}


def _processor() -> str:
    """Its name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
