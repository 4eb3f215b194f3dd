"""What decoding learned about a target and its drafter, kept from run to run under the XDG state directory.

One file of at most a few hundred KB for each pair, and a small one for each target with the speeds of its drafters; for
their owner alone, written whole or not at all. Seconds are kept with the machine and the placement where they were
measured, and count there alone: the folder may travel, or be shared. A file that cannot be read, or belongs to another
version or pair, costs the first sweeps some of their speed, and says so.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cli.engine.ngram_store import Arrays, load, save
from cli.shared.conditions import conditions
from cli.shared.options import EngineOptions
from offload.errors import OffloadError
from offload.hub.adapters import adapters_digest
from offload.hub.names import resolve
from offload.machine.file_identity import samples
from offload.machine.folders import folder_of

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

log = logging.getLogger(__name__)

VERSION = 3
PLACES = "places/"
ENOUGH = 16  # sweeps that say something about a speed
MOST_DRAFTERS = 16
MOST_PLACES = 16  # of one pair; machines that share the folder count, too
MOST_SEARCHES = 64  # placements of one model
MOST = 1e12  # tokens, or seconds


def learned_path(engine: Engine) -> Path:
    """Where this pair's lessons are kept."""
    return _path(engine, _pair(engine))


def speeds_path(options: EngineOptions) -> Path:
    """Where the speeds of a target's drafters are kept: those of runs with the same placement options."""
    same = replace(options, prefix_cache=None).but(drafter="auto", budget="auto", offline=False)
    return _file(f"speeds-{options.model}", _digest(repr(same), _identity_of(options.model)))


def measured(options: EngineOptions) -> dict[str, float]:
    """Tokens per second that drafters, by name, made with this target under these options on this machine."""
    arrays, here = load(speeds_path(options), set()) or {}, f"{_here()}/"
    rows = {name.removeprefix(here): row for name, row in arrays.items() if name.startswith(here)}
    whole = {name: row.tolist() for name, row in rows.items() if row.shape == (2,)}
    return {name: row[0] / row[1] for name, row in whole.items() if 0 < row[0] < MOST and 0 < row[1] < MOST}


@contextmanager
def searching(options: EngineOptions, found: MutableMapping[str, NDArray[np.generic]]) -> Iterator[None]:
    """For the length of the block `found` holds what earlier searches found with this model; what is new is kept."""
    own = _identity_of(options.model) + adapters_digest(options.load.lora)
    path = _file(f"searches-{options.model}", _digest(options.model, own))
    known = load(path, set()) or {}
    found.update(known)
    yield
    if found.keys() > known.keys():
        try:
            save(path, dict([*found.items()][-MOST_SEARCHES:]))
        except OSError as problem:
            log.warning("what the search found could not be kept: %s", problem)


@contextmanager
def learning(engine: Engine, options: EngineOptions) -> Iterator[None]:
    """For the length of the block the engine knows what earlier runs learned; what it learns itself is kept."""
    pair, before = _pair(engine), engine.progress().sweeps  # of the files as they were loaded
    _take_up(engine, pair, options)
    try:
        yield
    finally:
        if engine.progress().sweeps > before:
            try:
                _keep(engine, pair, options)
            except OSError as problem:
                log.warning("what was learned about the drafter could not be kept: %s", problem)


def _keep(engine: Engine, pair: NDArray[np.uint8], options: EngineOptions) -> None:
    path, own = _path(engine, pair), _place(engine, options)
    learned = {own + name if name.startswith("cost/") else name: array for name, array in engine.pack().items()}
    marks = {"version": np.array([VERSION]), "pair": pair, f"{own}kept": np.array([time.time()])}
    save(path, {**_elsewhere(path, pair, own), **learned, **marks})
    alone = engine.accounting.pace.alone
    keep_speed(options, engine.sources, alone.sweeps, alone.tokens, alone.seconds)


def keep_speed(options: EngineOptions, sources: str, sweeps: int, tokens: float, seconds: float) -> None:
    """For `measured`: what these sources wrote with this target. Raises OSError; too few sweeps say nothing."""
    if sweeps < ENOUGH:
        return
    path, here = speeds_path(options), f"{_here()}/"
    known, name, now = load(path, set()) or {}, here + sources, np.array([tokens, seconds])
    before = known.get(name, np.zeros(2))
    row = now + 0.5 * before.astype(np.float64) if before.shape == (2,) else now
    others = sorted(known, key=lambda other: other.startswith(here))  # those of other machines go first
    others = [other for other in others if other != name][1 - MOST_DRAFTERS :]
    save(path, {name: row} | {other: known[other] for other in others})


def _take_up(engine: Engine, pair: NDArray[np.uint8], options: EngineOptions) -> None:
    path = _path(engine, pair)
    arrays = _known(path, pair)
    if not arrays:
        return
    own = _place(engine, options)
    try:
        engine.unpack({name.removeprefix(own): array for name, array in arrays.items()})
    except ValueError as problem:
        log.warning("%s is damaged and is left out: %s.", path, problem)


def _known(path: Path, pair: NDArray[np.uint8]) -> Arrays:
    """What a file holds of this pair; nothing, with a warning, where it cannot be used."""
    arrays = load(path, {"version", "pair"}) or {}
    if arrays and (arrays["version"].tolist() != [VERSION] or arrays["pair"].tolist() != pair.tolist()):
        log.warning("%s was written by another version or for another pair of models, and is left out.", path)
        return {}
    return arrays


def _elsewhere(path: Path, pair: NDArray[np.uint8], own: str) -> Arrays:
    """The costs that are known of other places: those that were kept last."""
    others = {name: array for name, array in _known(path, pair).items() if name.startswith(PLACES)}
    kept_s = {name.removesuffix("kept"): float(array.sum()) for name, array in others.items() if name.endswith("/kept")}
    kept_s.pop(own, None)
    latest = tuple(sorted(kept_s, key=kept_s.__getitem__)[1 - MOST_PLACES :])
    return {name: array for name, array in others.items() if name.startswith(latest)}


def _file(name: str, digest: NDArray[np.uint8]) -> Path:
    plain = re.sub(r"[^\w.+-]+", "-", name)[:80]
    return folder_of("state") / "learned" / f"{plain}-{digest.tobytes().hex()}.safetensors"


def _path(engine: Engine, pair: NDArray[np.uint8]) -> Path:
    return _file(f"{engine.name}--{engine.drafter_name}", pair)


def _pair(engine: Engine) -> NDArray[np.uint8]:
    """Equal for the same two models and the same sources of guesses."""
    folders = (
        f"{role} {path} {_identity(path)}{adapters_digest(engine.adapters.get(role, ()))}"
        for role, path in engine.folders.items()
    )
    return _digest(engine.name, engine.drafter_name, *folders)


def _identity_of(model: str) -> str:
    """The same of a model by name; of one that is not here, or cannot be loaded either, nothing is known."""
    try:
        return _identity(resolve(model, offline=True).target)
    except (OffloadError, OSError):
        return ""


def _identity(folder: Path) -> str:
    """Another one for another model in the same place: config, sizes of the shards, and samples of the first."""
    digest = blake2b(digest_size=8)
    shards = sorted(folder.glob("*.safetensors"))
    for file in (folder / "config.json", *shards):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    digest.update((folder / "config.json").read_bytes())
    for shard in shards[:1]:
        digest.update(samples(shard))
    return digest.hexdigest()


def _place(engine: Engine, options: EngineOptions) -> str:
    """The prefix of the costs of runs whose sweeps cost the same."""
    head: list[str] = [] if options.load.head_quant == "none" else [options.load.head_quant]
    head += [] if options.load.compute == "float" else [f"in {options.load.compute}"]
    head += [f"KV in {options.load.kv_quant}"] if options.load.kv_quant else []
    head += [f"drafts on {options.load.drafter_device}"] if options.load.drafter_device != "auto" else []
    placed = (engine.device, engine.placement, options.load.dtype, f"{options.load.link_limit_Bps}", *head)
    return f"{PLACES}{_digest(_here(), *placed).tobytes().hex()}/"


def _here() -> str:
    """Equal where nothing is known that would make arithmetic faster or slower."""
    found = conditions("cpu") | conditions("cuda")
    return _digest(*(f"{name} {value}" for name, value in sorted(found.items()))).tobytes().hex()


def _digest(*parts: str) -> NDArray[np.uint8]:
    return np.frombuffer(blake2b("\0".join(parts).encode(), digest_size=8).digest(), np.uint8)
