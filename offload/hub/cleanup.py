"""Leftovers of interrupted downloads and packs, and revisions that nothing refers to. Knows no torch.

Only what provably belongs to the Hub's cache or to one of our packs is named, and nothing that is being written now.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload.checkpoint.manifest import ORIGINALS, PARTIAL, lock, read_manifest
from offload.hub import hub
from offload.hub.names import HUB_NAME, aliases

# A download that still runs writes more often than this.
QUIET_s = 600

Why = Literal["interrupted download", "old revision", "interrupted pack", "originals of a pack"]


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can go; `commit` of an old revision."""

    path: Path
    size_B: int
    why: Why
    commit: str = ""


def find_leftovers(folders: Sequence[Path]) -> list[Leftover]:
    """Those of the Hub's cache, and of packs that are or lie in `folders`."""
    packs = [path for folder in folders for path in (folder, *sorted(folder.iterdir())) if path.is_dir()]
    return [*_downloads(), *_revisions(), *(found for path in packs for found in _of_pack(path))]


def clear(found: Sequence[Leftover]) -> int:
    """Delete them; returns the bytes set free."""
    freed_B = 0
    commits = [leftover.commit for leftover in found if leftover.commit]
    if commits:
        from huggingface_hub import scan_cache_dir

        strategy = scan_cache_dir(hub.cache_folder()).delete_revisions(*commits)
        freed_B += strategy.expected_freed_size
        strategy.execute()
    for leftover in found:
        if leftover.commit:
            continue
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path)
        else:
            leftover.path.unlink(missing_ok=True)
        freed_B += leftover.size_B
    return freed_B


def _downloads() -> Iterator[Leftover]:
    for file in sorted(hub.cache_folder().glob("models--*--*/blobs/*.incomplete")):
        status = file.stat()
        if time.time() - status.st_mtime > QUIET_s:
            yield Leftover(file, status.st_size, "interrupted download")


def _revisions() -> Iterator[Leftover]:
    """Snapshots that no branch or tag names, and no alias."""
    from huggingface_hub import scan_cache_dir

    if not hub.cache_folder().is_dir():
        return
    named = [name for pair in aliases().values() for name in (pair.target, pair.drafter) if name]
    pinned = {match["revision"] for name in named if (match := HUB_NAME.fullmatch(name))}
    for repo in scan_cache_dir(hub.cache_folder()).repos:
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            if repo.repo_type == "model" and not revision.refs and revision.commit_hash not in pinned:
                yield Leftover(revision.snapshot_path, revision.size_on_disk, "old revision", revision.commit_hash)


def _of_pack(pack: Path) -> Iterator[Leftover]:
    if read_manifest(pack) is None or _in_use(pack):
        return
    for file in sorted(pack.glob(f"*{PARTIAL}")):
        yield Leftover(file, file.stat().st_size, "interrupted pack")
    originals = pack.with_name(pack.name + ORIGINALS)
    # The Hub library leaves its mark in folders that it downloads to.
    if (originals / ".cache" / "huggingface").is_dir():
        size_B = sum(file.stat().st_size for file in originals.rglob("*") if file.is_file())
        yield Leftover(originals, size_B, "originals of a pack")


def _in_use(pack: Path) -> bool:
    held = lock(pack)
    if held is not None:
        os.close(held)
    return held is None
