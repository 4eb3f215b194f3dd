"""How far the unfinished answers have come, in a side file: after a crash they go on where they were.

Tokens decide everything that follows, so token ids are all that has to be kept; keys and values are computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from cli.batch.input.items import Item
from cli.batch.output.files import on_disk, replace_file
from cli.batch.refusals import OutputRefused

Begun: TypeAlias = tuple[tuple[int, ...], ...]  # the tokens of each text of an item

log = logging.getLogger(__name__)

# What a crash may cost at most; writing more often would cost more than the sweeps of a small model.
EVERY_S = 2.0


@dataclass
class PartialFile:
    """Saved at most every EVERY_S; a run that ends well leaves no such file."""

    path: Path
    manifest_sha: str
    _saved_s: float = field(default_factory=time.monotonic)

    def load(self, items: Mapping[str, Item]) -> dict[str, Begun]:
        """Tokens of items that are still the same; anything else is worth nothing and is left out."""
        try:
            content = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except UnicodeDecodeError:
            content = ""
        except OSError as problem:
            raise OutputRefused(
                f"{self.path} cannot be read: {problem.strerror}.", hint="move it away; unfinished answers start again."
            ) from problem
        try:
            found = json.loads(content)
            if found["sum"] != _sum(found["items"]):
                raise ValueError("it was damaged")
            saved = {str(name): (str(sha), tuple(map(tuple, texts))) for name, (sha, texts) in found["items"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log.warning("%s is damaged or not of this version; unfinished answers start again.", self.path)
            return {}
        if found["manifest"] != self.manifest_sha:
            return {}
        return {
            name: texts
            for name, (sha, texts) in saved.items()
            if name in items and items[name].prompt_sha == sha and len(texts) == items[name].count
        }

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._saved_s >= EVERY_S

    def save(self, begun: Mapping[str, tuple[str, Begun]]) -> None:
        """Replace the file by these: id → prompt_sha, and the tokens of each text. Without any, there is no file."""
        with on_disk(self.path, "the unfinished answers"):
            if begun:
                record = {"manifest": self.manifest_sha, "sum": _sum(begun), "items": begun}
                replace_file(self.path, json.dumps(record))
            else:
                self.path.unlink(missing_ok=True)
        self._saved_s = time.monotonic()


def _sum(items: object) -> str:
    """Changes with every token: a damaged number would be another text."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]
