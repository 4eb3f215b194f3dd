"""Packing during the download: at most two of the original files are on disk at a time.

The plan is made from the headers, which the Hub sends without the weights. Then every file is fetched when its first
tensor is needed and deleted when another file needs the room. Nothing goes into the Hub's cache.
"""

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from offload.checkpoint.contents import find_weights, instead
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, checked, item_B, read_config, read_header, read_index
from offload.checkpoint.manifest import ORIGINALS
from offload.checkpoint.quantized.quantize import Quant
from offload.checkpoint.tensors import load_entry
from offload.errors import DiskFull, UnsupportedModel
from offload.hub import hub
from offload.packs.pack import BESIDE, REST, PackPlan, Shard, plan
from offload.placement.quantized_sizes import FourBits
from offload.units import size

HELD = 2


@dataclass
class Arriving:
    """One repository on its way into a pack."""

    repo: str
    commit: str
    staging: Path
    folder: Folder
    headers: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """Of the files that are here, the oldest first."""
    fetched: list[str] = field(default_factory=list)
    """Every file of weights that was downloaded, as often as it was."""

    @property
    def fetched_B(self) -> int:
        """Their bytes."""
        return sum(self.folder.file_sizes[self.staging / name] for name in self.fetched)

    @classmethod
    def begin(cls, repo: str, revision: str | None, out: Path, code: bool = False) -> "Arriving":
        """Everything but weights is fetched, next to `out`, Python if `code`; of the weights only the headers."""
        listing = hub.look_up(repo, revision, code)
        staging = out.with_name(out.name + ORIGINALS)
        for name in sorted(name for name in listing.sizes_B if not name.endswith(".safetensors")):
            hub.fetch(repo, listing.commit, name, staging)
        weights = find_weights(listing.sizes_B)
        if weights is None:
            raise instead(repo, listing.sizes_B, {})
        files = sorted({*read_index(staging / weights.index).values()}) if weights.index else list(weights.files)
        entries: dict[str, Entry] = {}
        for name in files:
            # Where they lie is known when the file is here; the order of names is used until then.
            for tensor, (dtype, shape) in hub.remote_header(repo, listing.commit, name).items():
                nbytes = math.prod(shape) * item_B(dtype, tensor)
                entries[tensor] = Entry(tensor, staging / name, 0, nbytes, dtype, shape)
        sizes = {staging / name: listing.sizes_B[name] for name in files}
        folder = checked(Folder(staging, read_config(staging), entries, sizes))
        if folder.config.get("quantization_config"):
            raise UnsupportedModel(
                f"{repo} is quantised already.", hint="specexec pull without --pack, and specexec pack --quant none."
            )
        # What an earlier run was about to use is fetched again rather than trusted.
        for file in staging.glob("*.safetensors"):
            file.unlink()
        return cls(repo, listing.commit, staging, folder)

    def plan(self, quant: Quant, out: Path, trust_remote_code: bool = False, head: FourBits = "none") -> PackPlan:
        """The pack in the order in which files arrive; the rest in one shard for each file that holds some of it."""
        found = plan(self.folder, quant, trust_remote_code, head)
        shards: list[Shard] = []
        for shard in found.shards:
            ordered = tuple(sorted(shard.entries, key=lambda entry: entry.file))
            if shard.file not in (REST, BESIDE):
                shards.append(replace(shard, entries=ordered))
                continue
            for number, file in enumerate(dict.fromkeys(entry.file for entry in ordered)):
                held = tuple(entry for entry in ordered if entry.file == file)
                few = shard.head if shard.head and shard.head[0] in {entry.name for entry in held} else None
                shards.append(Shard(f"{Path(shard.file).stem}-{number:05d}.safetensors", held, head=few))
        shards.sort(key=lambda shard: (shard.entries[-1].file, shard.entries[0].file))
        ready = replace(found, shards=tuple(shards))
        written_B = sum(file.stat().st_size for file in out.glob("*")) if out.is_dir() else 0
        need_B = ready.size_B - written_B + sum(sorted(self.folder.file_sizes.values())[-HELD:])
        free_B = shutil.disk_usage(self.staging).free
        if need_B > free_B:
            raise DiskFull(
                f"{self.repo} needs {size(need_B)} for its pack and two originals, {size(free_B)} are free.",
                hint="--out on another disk.",
            )
        return ready

    def load(self, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
        """One tensor; fetches its file, and lets the oldest file go if that would be one too many."""
        name = entry.file.name
        if name not in self.headers:
            while len(self.headers) >= HELD:
                oldest = next(iter(self.headers))
                (self.staging / oldest).unlink()
                del self.headers[oldest]
            hub.fetch(self.repo, self.commit, name, self.staging)
            self.fetched.append(name)
            self.headers[name] = read_header(entry.file)[1]
        return load_entry(self.headers[name][entry.name], dtype)

    def forget(self) -> None:
        """The pack is complete: what is left of the originals goes."""
        shutil.rmtree(self.staging)
