"""What a run's texts depend on, kept beside the results: a resumed run must not mix two configurations.

Drafter, budget, offload and the number of parallel answers are not here: they cannot change a text.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cli.batch.input.items import Json
from cli.batch.output.files import replace_file
from cli.batch.refusals import ManifestMismatch
from cli.openai.nesting import deeper

VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The configuration of a run, by the names of its options, and the process that writes it."""

    configuration: Mapping[str, Json]
    pid: int
    started: str
    version: int = VERSION

    @staticmethod
    def now(configuration: Mapping[str, Json]) -> Manifest:
        """Written by this process; what JSON has no word for (a tuple) is what a file would give back."""
        return Manifest(json.loads(json.dumps(dict(configuration))), os.getpid(), time.strftime("%H:%M:%S"))

    @property
    def sha(self) -> str:
        """The name of the configuration in every record."""
        text = json.dumps(dict(sorted(self.configuration.items())), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of an earlier run, if there is one that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if deeper(found):
            return None
        return Manifest(dict(found["configuration"]), int(found["pid"]), str(found["started"]), int(found["version"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def check_same(output: Path, then: Manifest | None, now: Manifest) -> None:
    """Refuse to continue a file that was made in another way, and say what differs."""
    if then is None or then.version != now.version:
        raise ManifestMismatch(
            f"{output} cannot be continued: its manifest is missing or not one of this version.",
            hint="another -o, or --overwrite to start again.",
        )
    names = [*now.configuration, *(name for name in then.configuration if name not in now.configuration)]
    differ = [name for name in names if then.configuration.get(name) != now.configuration.get(name)]
    if differ:
        first, *others = differ
        also = f" (also differs: {', '.join(others)})" if others else ""
        before, after = (_shown(one.configuration.get(first)) for one in (then, now))
        raise ManifestMismatch(
            f"{output} was made with {first} {before}, this run has {after}{also}.",
            hint="the old settings, another -o, or --overwrite.",
        )


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
