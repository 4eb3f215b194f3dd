"""Where weights can be streamed: direct reads, locks and memory limits are those of Linux, which WSL2 is too."""

import platform
import sys

from offload.errors import NotEnoughRam, UnsupportedSystem
from offload.units import size

MiB = 1 << 20
# What the libraries take when they are imported, of data and of addresses; where they get less some never return.
LIBRARIES_B = {"-d": 384 * MiB, "-v": 1024 * MiB}


def check_system() -> None:
    """Refuse, before anything is tried, other operating systems and limits under which nothing can be imported.

    Raises UnsupportedSystem, NotEnoughRam.
    """
    if sys.platform != "linux":
        raise UnsupportedSystem(
            f"specexec runs on Linux and on WSL2; this is {platform.system() or sys.platform}.",
            "Direct reads, file locks and memory limits are those of Linux.",
            "on Windows: wsl --install, and specexec inside of it; else a Linux machine.",
        )
    for option, limit_B in ulimits().items():
        if limit_B < LIBRARIES_B[option]:
            raise NotEnoughRam(
                f"the shell allows a process {size(limit_B)} (ulimit {option}), and Python's libraries take more.",
                hint=f"ulimit {option} unlimited, or a larger number.",
            )


def ulimits() -> dict[str, int]:
    """Bytes that a shell's `ulimit` allows this process, by the option that sets them; without what is not limited."""
    import resource  # not on every system

    limits = {"-d": resource.RLIMIT_DATA, "-v": resource.RLIMIT_AS}
    found = {option: resource.getrlimit(limit)[0] for option, limit in limits.items()}
    return {option: limit_B for option, limit_B in found.items() if limit_B != resource.RLIM_INFINITY}
