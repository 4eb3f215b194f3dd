"""What decoding taught about a target and its drafter, kept from run to run under the XDG state directory.

One file of at most a few hundred KB for each pair, for its owner alone, written whole or not at all. A file that cannot
be read, or belongs to another version or pair, costs the first sweeps some of their speed, and says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cli.options import EngineOptions
from cli.recall import load, save

if TYPE_CHECKING:
    from specexec.engine import Engine

log = logging.getLogger(__name__)

VERSION = 1


def learned_path(engine: Engine) -> Path:
    """Where this pair's lessons are kept."""
    from platformdirs import user_state_path

    name = re.sub(r"[^\w.+-]+", "-", f"{engine.name}--{engine.drafter_name}")[:80]
    return user_state_path("specexec") / "learned" / f"{name}-{_pair(engine).tobytes().hex()}.safetensors"


@contextmanager
def learning(engine: Engine, options: EngineOptions) -> Iterator[None]:
    """For the length of the block the engine knows what earlier runs learned; what it learns itself is kept."""
    path, before = learned_path(engine), engine.progress().sweeps
    _take_up(engine, path, options)
    try:
        yield
    finally:
        lessons = engine.pack()
        if lessons and engine.progress().sweeps > before:
            marks = {"version": np.array([VERSION]), "pair": _pair(engine), "place": _place(engine, options)}
            try:
                save(path, lessons | marks)
            except OSError as problem:
                log.warning("what was learned about the drafter could not be kept: %s", problem)


def _take_up(engine: Engine, path: Path, options: EngineOptions) -> None:
    arrays = load(path, {"version", "pair", "place"})
    if arrays is None:
        return
    if arrays["version"].tolist() != [VERSION] or arrays["pair"].tolist() != _pair(engine).tolist():
        log.warning("%s was written by another version or for another pair of models, and is left out.", path)
        return
    if arrays["place"].tolist() != _place(engine, options).tolist():  # seconds belong to a placement, trust does not
        arrays = {name: array for name, array in arrays.items() if not name.startswith("cost/")}
    try:
        engine.unpack(arrays)
    except ValueError as problem:
        log.warning("%s is damaged and is left out: %s.", path, problem)


def _pair(engine: Engine) -> NDArray[np.uint8]:
    """Equal for the same two models and the same sources of guesses."""
    return _digest(engine.name, engine.drafter_name, *(f"{role} {path}" for role, path in engine.folders.items()))


def _place(engine: Engine, options: EngineOptions) -> NDArray[np.uint8]:
    """Equal for runs whose sweeps cost the same."""
    return _digest(engine.device, engine.placement, options.dtype, f"{options.link_limit}", options.planner)


def _digest(*parts: str) -> NDArray[np.uint8]:
    return np.frombuffer(blake2b("\0".join(parts).encode(), digest_size=8).digest(), np.uint8)
