"""Whether a training has room: what it takes in memory and on the disk, beside what is free there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cli.shared.errors import OutputDiskFull
from cli.shared.quantities import format_bytes
from offload.errors import NotEnoughRam, NotEnoughVram
from offload.machine.memory import free_ram, free_vram_B

if TYPE_CHECKING:
    import torch

    from specexec.distill.training import Student


def check_room(student: Student, memory_B: int, device: torch.device, folder: Path) -> str:
    """What is taken and what is free, in words. Raises NotEnoughRam, NotEnoughVram or OutputDiskFull.

    `memory_B` counts the student itself, which is in main memory already.
    """
    from specexec.distill.training import DISK_B

    held_B = sum(one.nbytes for one in student.trained.values()) if device.type == "cpu" else 0
    free_B = (free_ram().free_B if device.type == "cpu" else free_vram_B(str(device))) + held_B
    needed = f"about {format_bytes(memory_B)} of memory, {format_bytes(free_B)} are free"
    if memory_B > free_B:
        lacking = NotEnoughRam if device.type == "cpu" else NotEnoughVram
        raise lacking(f"training takes {needed}.", hint="a smaller --batch, or a smaller --draft-vocab for a head.")
    disk_B = DISK_B * sum(one.numel() for one in student.trained.values())
    there = next(one for one in (folder, *folder.resolve().parents) if one.is_dir())
    free_disk_B = shutil.disk_usage(there).free
    if disk_B > free_disk_B:
        raise OutputDiskFull(
            f"training in {folder} takes {format_bytes(disk_B)}, and {format_bytes(free_disk_B)} are free.",
            why="Two checkpoints at a time, and what is written in the end.",
            hint="another disk.",
        )
    return f"{needed}; at most {format_bytes(disk_B)} on the disk, {format_bytes(free_disk_B)} are free"
