"""Memory refused while something ran, as an error that says when and what to change. Knows no model."""

import torch

from offload.errors import NotEnoughRam, NotEnoughVram, OffloadError


def refusal(error: BaseException, when: str, hint: str) -> OffloadError | None:
    """What to raise instead of an allocator's error; None for any other error. `when`: "while layer 3 computed"."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if isinstance(error, torch.OutOfMemoryError):
        return NotEnoughVram(f"GPU memory ran out {when}.", said, hint)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return NotEnoughRam(f"memory ran out {when}.", said, hint)
    return None
