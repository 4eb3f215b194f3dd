"""GGUF files that other programs keep on this machine: Ollama's blobs by the names of its models, LM Studio's folders.

Reads their lists of files, never a weight, and changes nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offload.checkpoint.gguf.model import BESIDE, SPLIT

MODEL_LAYER = "application/vnd.ollama.image.model"
# Where Ollama's service keeps its models on Linux, which is another user's home.
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")


@dataclass(frozen=True)
class AppModel:
    """A model of another program: what it is called there, and its (first) file."""

    app: str
    name: str
    file: Path


def models_of_apps(home: Path, ollama: Path | None = None) -> list[AppModel]:
    """What Ollama (in `ollama`, or where it is by default) and LM Studio keep, as far as it can be read."""
    folders = [ollama] if ollama else [home / ".ollama" / "models", OLLAMA_SERVICE]
    found = [model for folder in folders for model in _of_ollama(folder)]
    for folder in (home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"):
        found += _of_lm_studio(folder)
    return found


def _of_ollama(folder: Path) -> Iterator[AppModel]:
    """manifests/HOST/NAMESPACE/MODEL/TAG are JSON and name their blobs."""
    for manifest in _files(folder / "manifests", "*/*/*/*"):
        blob = _blob(folder, manifest)
        if blob is not None and blob.is_file():
            _, space, model, tag = manifest.parts[-4:]
            yield AppModel("Ollama", f"{'' if space == 'library' else f'{space}/'}{model}:{tag}", blob)


def _blob(folder: Path, manifest: Path) -> Path | None:
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
        digests = [str(layer["digest"]) for layer in layers if layer["mediaType"] == MODEL_LAYER]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # another program's file in a form that it does not have today
    plain = digests and digests[0].startswith("sha256:") and digests[0].removeprefix("sha256:").isalnum()
    return folder / "blobs" / digests[0].replace(":", "-") if plain else None


def _of_lm_studio(folder: Path) -> Iterator[AppModel]:
    """PUBLISHER/MODEL/FILE.gguf; of a split set the first file stands for all."""
    for file in _files(folder, "*/*/*.gguf"):
        match = SPLIT.fullmatch(file.name)
        if not file.name.startswith(BESIDE) and (match is None or int(match["number"]) == 1):
            yield AppModel("LM Studio", "/".join(file.parts[-3:-1]), file)


def _files(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(file for file in folder.glob(pattern) if file.is_file())
    except OSError:
        return []  # another user's, who lets nobody look
