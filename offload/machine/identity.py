"""Which machine this is: its processor and GPUs by name. Starts neither torch nor CUDA."""

import platform
from functools import cache
from pathlib import Path

from offload.machine.gpus import gpus

# A folder for each GPU, by its place on the bus; not on WSL, where only a program of the driver knows their names.
DRIVER = Path("/proc/driver/nvidia/gpus")
PROCESSORS = Path("/proc/cpuinfo")
KIND = ("model name", "cpu family", "model")  # rented machines call different processors by one name


@cache  # a program of the driver may take half a second, and is asked at the beginning and at the end of a run
def machine(device: str, driver: Path = DRIVER, processors: Path = PROCESSORS) -> dict[str, str]:
    """By name, for `cpu` or `cuda`: what was measured on another machine says nothing about this one."""
    kind = " ".join(filter(None, (_field(processors, name) for name in KIND)))
    processor = {"processor": kind or platform.machine()}
    if device == "cpu":
        return processor
    models = [_field(file, "Model") for file in sorted(driver.glob("*/information"))] or [gpu.name for gpu in gpus()]
    return processor | {"GPU": ", ".join(dict.fromkeys(models)) or "none"}


def _field(file: Path, name: str) -> str:
    """The text after the first `name:` in a file of the kernel; nothing where it cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    cells = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in cells if key.strip() == name), "")
