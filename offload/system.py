"""Where weights can be streamed: direct reads, locks and memory limits are those of Linux, which WSL2 is too."""

import platform
import sys

from offload.errors import UnsupportedSystem


def check_system() -> None:
    """Refuse other operating systems before anything is tried on them. Raises UnsupportedSystem."""
    if sys.platform != "linux":
        raise UnsupportedSystem(
            f"specexec runs on Linux and on WSL2; this is {platform.system() or sys.platform}.",
            "Direct reads, file locks and memory limits are those of Linux.",
            "on Windows: wsl --install, and specexec inside of it; else a Linux machine.",
        )
