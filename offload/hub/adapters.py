"""Which LoRA adapters are meant: a name for exactly these, for all that is kept from run to run. Knows no torch."""

import hashlib
from collections.abc import Iterable

from offload.checkpoint.contents import ADAPTER
from offload.checkpoint.lora import WEIGHTS, split
from offload.machine.file_identity import samples


def adapters_digest(asked: Iterable[str]) -> str:
    """Equal for the same adapters with the same scales in the same order; nothing for none."""
    digest, any_of_them = hashlib.sha256(), False
    for path, scale in map(split, asked):
        any_of_them = True
        digest.update(f"{scale!r}\n".encode() + (path / ADAPTER).read_bytes() + samples(path / WEIGHTS))
    return digest.hexdigest()[:12] if any_of_them else ""
