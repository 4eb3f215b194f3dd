"""The prefix cache: keys and values of texts on disk, shared by conversations, batches and servers of this machine.

One folder of at most `limit_B` bytes for all models; what was used longest ago leaves first. Several processes may use
it at once. All of it may be deleted: only time is lost, no text changes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.engine.model_identity import identities_of
from cli.engine.prefix_chain import ABOUT, PrefixChain
from offload.machine.atomic_write import PRIVATE, replacing
from offload.machine.folders import folder_of

if TYPE_CHECKING:
    from specexec.engine.engine import Engine
    from specexec.model.cache import KVCache
    from specexec.model.tree_lm import TreeLM

log = logging.getLogger(__name__)

USUAL_LIMIT_B = 10 << 30
SPARE_B = 1 << 30  # of the disk, left to others
WORTH_READING = 16  # tokens: fewer are sooner computed
LIMIT = "limit"
PAGE_B = 4096
STALE_s = 3600  # writing a file takes less


@dataclass(frozen=True)
class ModelTexts:
    """What is kept of one model."""

    folder: Path
    model: str
    how: str
    size_B: int
    used_s: float


class PrefixStore:
    """Beginnings of texts of an engine's models (specexec/engine/prefixes.py)."""

    def __init__(self, folder: Path, chains: Mapping[TreeLM, PrefixChain], target: PrefixChain) -> None:
        self._folder, self._chains, self._target = folder, chains, target
        self._refused = False

    @classmethod
    def of(cls, engine: Engine, folder: Path | None = None) -> PrefixStore:
        """That of an engine's models, in the user's cache folder if no other is given."""
        folder = folder or prefixes_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found, models = identities_of(engine), engine.models
        chains = {role: PrefixChain(folder / one.digest, one.said) for role, one in found.items()}
        return cls(folder, {models[role]: chain for role, chain in chains.items()}, chains["target"])

    def known(self, tokens: Items[int]) -> int:
        """How many of these tokens the target need not read."""
        return self._target.known(tokens)

    def fill(self, tokens: Items[int], caches: dict[object, KVCache]) -> None:
        """Put in, by model, what is kept of the beginning of `tokens`, where that is more than a cache holds of it."""
        from specexec.model.cache import common_prefix

        for model, chain in self._chains.items():
            cache = caches.get(model)
            held = cache.reusable(common_prefix(cache.tokens, tokens)) if cache else 0
            if chain.known(tokens) < held + WORTH_READING:
                continue
            if (found := chain.load(tokens, model.memory_of)) is not None:
                caches[model] = found

    def keep(self, caches: Mapping[object, KVCache]) -> None:
        """Keep what these hold; what cannot be kept is said once, and costs time alone."""
        try:
            for model, chain in self._chains.items():
                if model in caches:
                    chain.keep(caches[model], self._has_room)
            make_room(self._folder)
        except OSError as problem:
            self._refuse(problem.strerror or str(problem))

    def _has_room(self, size_B: int) -> bool:
        if shutil.disk_usage(self._folder).free >= size_B + SPARE_B:
            return True
        self._refuse("the disk has less than 1 GiB to spare")
        return False

    def _refuse(self, why: str) -> None:
        if not self._refused:
            self._refused = True
            log.warning("keys and values are not kept for later texts: %s.", why)


def prefixes_folder() -> Path:
    """Where the prefix cache lies."""
    return folder_of("cache") / "prefixes"


def limit_B(folder: Path) -> int:
    """The most bytes that the prefix cache may take."""
    try:
        return int((folder / LIMIT).read_text())
    except (OSError, ValueError):
        return USUAL_LIMIT_B


def set_limit(folder: Path, size_B: int) -> None:
    """From now on the prefix cache takes no more; what is too much leaves at once. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing(folder / LIMIT, PRIVATE) as file:
        file.write(str(size_B).encode())
    make_room(folder)


def make_room(folder: Path) -> None:
    """Remove what was used longest ago, until the rest is within the limit; and what a dead process left behind."""
    files = sorted(_files(folder), key=lambda one: one[1].st_mtime_ns, reverse=True)
    room_B, now_s = limit_B(folder), time.time()
    for path, status in files:
        if path.name.startswith("."):
            if now_s - status.st_mtime > STALE_s:
                path.unlink(missing_ok=True)
            continue
        room_B -= _taken_B(status)
        if room_B < 0:
            path.unlink(missing_ok=True)


def everything(folder: Path) -> list[ModelTexts]:
    """What is kept of each model, the latest first."""
    found = []
    for inner in {path.parent for path, _ in _files(folder)}:
        statuses = [status for path, status in _files(folder) if path.parent == inner]
        said = _said(inner)
        size_B, used_s = sum(map(_taken_B, statuses)), max(status.st_mtime for status in statuses)
        found.append(ModelTexts(inner, said.get("model", "?"), said.get("how", "?"), size_B, used_s))
    return sorted(found, key=lambda one: one.used_s, reverse=True)


def clear(folder: Path) -> None:
    """Remove all of it but the limit. Raises OSError."""
    for inner in {path.parent for path, _ in _files(folder)}:
        shutil.rmtree(inner, ignore_errors=False)


def forget(tokens: Items[int], folder: Path) -> None:
    """Remove what is kept of a text, of every model; others that begin alike lose what they share with it."""
    for inner in {path.parent for path, _ in _files(folder)}:
        PrefixChain(inner).forget(tokens)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of all models; those that leave meanwhile are left out."""
    for path in folder.glob("*/*"):
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue


def _taken_B(status: os.stat_result) -> int:
    return -(-status.st_size // PAGE_B) * PAGE_B


def _said(folder: Path) -> dict[str, str]:
    try:
        said = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in said.items()} if isinstance(said, dict) else {}
