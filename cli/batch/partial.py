"""How far the unfinished answers have come, in a side file: after a crash they go on in the middle.

Tokens decide everything that follows, so token ids are all that has to be kept; keys and values are computed again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cli.batch.files import on_disk, replace_file
from cli.batch.items import Item

log = logging.getLogger(__name__)

# What a crash may cost at most; writing more often would cost more than the sweeps of a small model.
EVERY_S = 2.0


@dataclass
class PartialFile:
    """Saved at most every EVERY_S; a run that ends well leaves no such file."""

    path: Path
    manifest_sha: str
    _saved_s: float = field(default_factory=time.monotonic)

    def load(self, items: Mapping[str, Item]) -> dict[str, tuple[int, ...]]:
        """Tokens of items that are still the same; anything else is worth nothing and is left out."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["manifest"] != self.manifest_sha:
                return {}
            begun = {str(name): (str(sha), tuple(map(int, tokens))) for name, (sha, tokens) in found["items"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s cannot be read; unfinished answers start again.", self.path)
            return {}
        return {
            name: tokens
            for name, (sha, tokens) in begun.items()
            if tokens and name in items and items[name].prompt_sha == sha
        }

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._saved_s >= EVERY_S

    def save(self, begun: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Replace the file by these: id → prompt_sha and tokens. Without any, there is no file."""
        with on_disk(self.path, "the unfinished answers"):
            if begun:
                replace_file(self.path, json.dumps({"manifest": self.manifest_sha, "items": begun}))
            else:
                self.path.unlink(missing_ok=True)
        self._saved_s = time.monotonic()
