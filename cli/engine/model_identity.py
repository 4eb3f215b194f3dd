"""Names for the exact models of an engine as they compute here: two of a name give a text the same keys and values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import offload
import specexec
from cli.shared.conditions import conditions
from offload.checkpoint.headers import open_folder
from offload.hub.adapters import adapters_digest
from offload.machine.file_identity import samples, stamps

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

_CODE = (
    Path(specexec.__file__).parent / "model",
    *(Path(offload.__file__).parent / name for name in ("checkpoint", "model")),
)


@dataclass(frozen=True)
class Identity:
    """`digest` names it, `said` is the part for people."""

    digest: str
    said: dict[str, str]


def fingerprint(folder: Path) -> str:
    """A name for the exact weights of a folder: its documents, and of every shard samples, inode, size and times."""
    seen, shards = hashlib.sha256(), sorted(open_folder(folder).file_sizes)
    for document in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".py")):
        seen.update(f"{document.name}\n".encode() + document.read_bytes())
    seen.update(json.dumps(stamps(shards)).encode())
    for shard in shards:
        seen.update(samples(shard))
    return seen.hexdigest()


def identities_of(engine: Engine) -> dict[str, Identity]:
    """Those of the models that keep keys and values of an engine's texts, by role."""
    found = {}
    for role, lm in engine.models.items():
        folder, how = engine.folders[role], [str(lm.model.dtype).removeprefix("torch.")]
        if role == "target":
            how += [f"computes in {engine.compute}"] if engine.compute != "float" else []
            how += [f"KV in {engine.kv_quant} bits"] if engine.kv_quant else []
        else:
            how += ["as a drafter"]  # whose layers may have fewer bits: it only guesses
        weights = fingerprint(folder) + adapters_digest(engine.adapters.get(role, ()))
        named = json.dumps([weights, how, _computing(engine.device)])
        digest = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
        found[role] = Identity(digest, {"model": str(folder), "how": ", ".join(how)})
    return found


def _computing(device: str) -> dict[str, str]:
    """What else decides about the bits of a sum."""
    kind = device.partition(":")[0]
    here = {name: value for name, value in conditions(kind).items() if name != "threads"}
    files = sorted(file for folder in _CODE for file in folder.rglob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return here | {"device": kind, "code": code, "transformers": version("transformers")}
