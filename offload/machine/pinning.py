"""RAM that a device copies from directly: pinned where it lies, as many bytes as are asked for.

CUDA's own call, which torch's build for AMD has too: torch's own pinned memory is rounded up to powers of two and kept
when it is freed. Other devices have no such call: they copy from RAM as it is, which is right and slower.
"""

import logging
from contextlib import suppress
from functools import cache

import torch

log = logging.getLogger(__name__)


def pin(device: torch.device, address: int, nbytes: int) -> int:
    """Pin these bytes; 0, or the number of CUDA's error. Where nothing can be pinned by its address, says so once."""
    if device.type != "cuda":
        _say_unpinned(device.type)
        return 0
    error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
    if error:
        _forget_error(device)
    return error


def unpin(device: torch.device, address: int) -> None:
    """Undo a `pin` that succeeded."""
    if device.type == "cuda":
        torch.cuda.cudart().cudaHostUnregister(address)


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the error of a call and hands it to whatever launches next in this thread: let that be this."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)


@cache
def _say_unpinned(kind: str) -> None:
    log.warning("RAM cannot be pinned for copies to %s: they are slower than the link.", kind)
