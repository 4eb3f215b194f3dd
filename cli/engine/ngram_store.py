"""What the ngram drafter remembers, on disk: this model's earlier texts and the corpus of `specexec index`.

Token ids belong to a tokenizer, so files are named after it. Under the XDG cache, for their owner alone, written whole
or not at all; a file that cannot be read costs speed only, and says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from offload.machine.atomic_write import PRIVATE, replacing
from offload.machine.folders import folder_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specexec.drafters.retrieval.memory import Memory
    from specexec.engine.engine import Engine

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[np.generic]]


def past_path(tokenizer: PreTrainedTokenizerBase, model: str) -> Path:
    """Where the texts of one model are kept."""
    name = re.sub(r"[^\w.-]+", "-", model).strip("-")[-60:]
    return _folder() / f"past-{_fingerprint(tokenizer)}-{name}.safetensors"


def corpus_path(tokenizer: PreTrainedTokenizerBase) -> Path:
    """Where the corpus of all models with this tokenizer is kept."""
    return _folder() / f"corpus-{_fingerprint(tokenizer)}.safetensors"


@contextmanager
def recalling(engine: Engine) -> Iterator[None]:
    """For the length of the block the engine's drafter remembers earlier runs; what it learned is kept at the end."""
    memory = engine.memory
    if memory is None:  # no drafter reads what was written
        yield
        return
    past = past_path(engine.tokenizer, engine.name)
    _recall(memory, past, corpus_path(engine.tokenizer), engine.vocabulary)
    try:
        yield
    finally:
        if memory.written:
            try:
                save(past, memory.pack())
            except OSError as problem:
                log.warning("what was written could not be remembered: %s", problem)


def save(path: Path, arrays: Arrays) -> None:
    """Replace the file at once: a crash leaves the old one or the new one."""
    from safetensors.numpy import save as serialise

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing(path, PRIVATE) as file:
        file.write(serialise({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def forget(tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """Delete all that is remembered in this tokenizer's ids; the files that were there."""
    files = [file for file in sorted(_folder().glob(f"*-{_fingerprint(tokenizer)}*.safetensors")) if not file.is_dir()]
    for file in files:
        file.unlink()
    return files


def _recall(memory: Memory, past: Path, corpus: Path, vocabulary: int) -> None:
    from specexec.drafters.retrieval.suffix_index import Settled

    for path in (past, corpus):
        names = {"tokens", "order"} | ({"seen", "hit"} if path == past else set())
        if (arrays := load(path, names)) is None:
            continue
        try:
            if path == past:
                memory.unpack(arrays, vocabulary)
            else:
                memory.corpus = Settled.kept(arrays["tokens"], arrays["order"], vocabulary)
        except ValueError as problem:
            log.warning("%s is damaged and is left out: %s.", path, problem)


def load(path: Path, names: set[str]) -> Arrays | None:
    """The arrays of a file that holds at least these; None, with a warning if it is there and cannot be used."""
    from safetensors.numpy import load_file

    try:
        if not path.is_file():
            return None
        arrays = load_file(path)
    except (OSError, SafetensorError, AttributeError, TypeError) as problem:  # the last two: types numpy does not have
        log.warning("%s cannot be read and is left out: %s", path, problem)
        return None
    if names <= set(arrays) and all(array.dtype.kind in "fiu" for array in arrays.values()):
        return arrays
    log.warning("%s holds something else and is left out.", path)
    return None


def _folder() -> Path:
    return folder_of("cache") / "recall"


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give the same ids to the same strings."""
    digest = blake2b(digest_size=8)
    for text, token in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token}\0{text}\0".encode())
    return digest.hexdigest()
