"""The manifest of a pack: each shard's size and hash. Knows no torch, so that looking at packs is cheap."""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from offload.checkpoint.contents import MANIFEST
from offload.checkpoint.documents import Json, read_json

log = logging.getLogger(__name__)

FORMAT = "specexec-pack"
PARTIAL = ".partial"  # ends the name of a file that is being written
ORIGINALS = ".originals"  # ends the name of the folder beside a pack that holds what it is made from
# Enough for the disk to stream, little enough to forget.
CHUNK_B = 16 << 20

Advance = Callable[[int], object]


@dataclass(frozen=True)
class FinishedFile:
    """A finished file, as the manifest remembers it."""

    size_B: int
    sha256: str


def lock(out: Path) -> int | None:
    """The lock under which a pack is written, as a descriptor to be closed; None while another process holds it."""
    folder = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        return None
    return folder


def read_manifest(out: Path) -> dict[str, Json] | None:
    """The manifest of a pack; None where there is no pack."""
    if not os.path.lexists(out / MANIFEST):
        return None
    manifest = read_json(out / MANIFEST)
    return manifest if manifest.get("format") == FORMAT else None


def finished(manifest: Mapping[str, Json]) -> dict[str, FinishedFile]:
    """The shards that are written, and what they were then."""
    shards = manifest.get("shards")
    rows = shards.items() if isinstance(shards, dict) else ()
    return {
        name: FinishedFile(size_B, str(row["sha256"]))
        for name, row in rows
        if isinstance(row, dict) and isinstance(size_B := row.get("size"), int) and "sha256" in row
    }


def still_true(manifest: dict[str, Json], originals: dict[str, Json]) -> dict[str, FinishedFile]:
    """The shards that were written from exactly these originals; `originals` identifies them and is kept there."""
    then, done = manifest.get("originals", originals), finished(manifest)
    manifest["originals"] = originals
    if then == originals or not done:
        return done
    log.warning("the originals were written to since this pack was begun: all of it is written anew")
    return {}


def verify(out: Path, advance: Advance = lambda nbytes: None) -> list[str]:
    """The shards of a finished pack whose bytes are not those that were written; empty when all is well."""
    done = finished(read_manifest(out) or {})
    return [
        name for name, wrote in done.items() if not (out / name).is_file() or digest_of(out / name, advance) != wrote
    ]


def digest_of(path: Path, advance: Callable[[int], object] = lambda nbytes: None) -> FinishedFile:
    """Size and hash of a file that is there."""
    digest, size_B = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_B):
            digest.update(chunk)
            size_B += len(chunk)
            advance(len(chunk))
    return FinishedFile(size_B, digest.hexdigest())
