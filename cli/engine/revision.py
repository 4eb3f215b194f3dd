"""A name for a checkpoint by what its texts depend on, whatever its folder is called. Loads nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from offload.hub.adapters import adapters_digest
from offload.machine.file_identity import samples


def fingerprint(folder: Path, adapters: Iterable[str] = ()) -> str:
    """Names a checkpoint by what its text depends on: configs, tokenizer, sizes, headers and samples of weights.

    What is added to these weights (`adapters`, FOLDER or FOLDER:scale) is part of the name.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + samples(file))
    return digest.hexdigest()[:12] + adapters_digest(adapters)
