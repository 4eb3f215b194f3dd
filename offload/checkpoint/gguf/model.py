"""A model in files of other programs, and the folder of documents that is made from them: a GGUF file or a set of
them, or Mistral's own layout.

transformers and everything here read documents from a folder: config.json, tokenizer.json, chat templates. A GGUF file
has one header instead. So its documents are written once into the cache, some megabytes, beside a note of the file
that they are from; weights are never copied. Knows no torch.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.checkpoint.contents import GGUF_NOTE, find_weights
from offload.checkpoint.documents import CONFIG, Json, read_json
from offload.checkpoint.entry import Entry
from offload.checkpoint.gguf import consolidated
from offload.checkpoint.gguf.architectures import config_of
from offload.checkpoint.gguf.consolidated import FILE, PARAMS, TEKKEN
from offload.checkpoint.gguf.facts import GgufFacts
from offload.checkpoint.gguf.header import MAGIC, GgufHeader, GgufTensor, read_gguf
from offload.checkpoint.gguf.names import tensors_of
from offload.checkpoint.gguf.tekken import tekken_documents
from offload.checkpoint.gguf.tokenizer import LISTS, tokenizer_documents
from offload.errors import BadModelDir, CorruptShard, DiskFull
from offload.machine.folders import folder_of

# Documents of another version are written anew.
VERSION = 2
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
SUFFIX = ".gguf"
# A vision tower or an adapter beside the model is no part of it.
BESIDE = ("mmproj",)
# What may lie beside a file in its folder and is then taken instead of what the header says.
OWN_DOCUMENTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class GgufModel:
    """The headers of all files of a model, the first one with its description."""

    headers: tuple[GgufHeader, ...]
    facts: GgufFacts

    def tensors(self) -> Iterator[Entry]:
        """Every tensor, under the name of a transformers checkpoint."""
        for header in self.headers:
            yield from tensors_of(header, self.facts)


def documents_folder(path: Path) -> Path:
    """The folder of documents of the GGUF model at `path`, written if need be; any other path is returned as it is.

    `path`: a file, any file of a split set, a folder that holds one of both and nothing else, a folder in Mistral's own
    layout, or a folder of documents.
    Raises BadModelDir, CorruptShard and UnsupportedModel for what cannot be read, DiskFull.
    """
    if files := source_files(path):
        return _documents(files, _noted(path, "own"))
    if files := gguf_files(path) or consolidated_files(path):
        beside = [path / name for name in (*OWN_DOCUMENTS, PARAMS, TEKKEN)] if path.is_dir() else []
        return _documents(files, [file for file in beside if file.is_file()])
    return path


def consolidated_files(path: Path) -> tuple[Path, ...]:
    """The weights of a folder in Mistral's own layout, in their order; none for any other folder."""
    if not path.is_dir() or not (path / PARAMS).is_file() or (path / CONFIG).exists():
        return ()
    return tuple(sorted(file for file in path.iterdir() if FILE.fullmatch(file.name)))


def source_files(folder: Path) -> tuple[Path, ...]:
    """The files that a folder of documents was made from; none for any other folder."""
    if not (folder / GGUF_NOTE).is_file():
        return ()
    files = tuple(_noted(folder, "files"))
    if not files or (gone := next((file for file in files if not file.is_file()), None)):
        raise BadModelDir(f"{gone or folder} is gone; {folder} holds only its documents.", hint="-m with the file.")
    return files


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of the GGUF model at a path, in their order; none where there is another model or nothing."""
    if path.is_file():
        return _set_of(path) if is_gguf(path) else ()
    if not path.is_dir():
        return ()
    names = [file.name for file in path.iterdir() if not file.is_dir()]
    ggufs = sorted(name for name in names if name.endswith(".gguf") and not name.startswith(BESIDE))
    if not ggufs or find_weights(names) is not None:
        return ()
    models = {match["stem"] if (match := SPLIT.fullmatch(name)) else name: name for name in reversed(ggufs)}
    if len(models) > 1:
        raise BadModelDir(
            f"{path} holds {len(models)} GGUF models: {', '.join(sorted(models.values())[:4])}"
            f"{' …' if len(models) > 4 else ''}.",
            hint=f"-m with one of the files: {path / sorted(models.values())[0]}",
        )
    return _set_of(path / ggufs[0])


def open_gguf(files: Sequence[Path], wanted: Sequence[str] = ()) -> GgufModel:
    """The headers of a model's files, checked against each other."""
    headers = [read_gguf(files[0], wanted), *(read_gguf(file) for file in files[1:])]
    for index, header in enumerate(headers):
        part = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1) or 1
        if part != (index, len(headers)):
            raise CorruptShard(
                f"{header.file.name} says that it is part {part[0]} of {part[1]}, it lies there as part {index} of "
                f"{len(headers)} (split.no, split.count; from 0).",
                hint="download all files of the model again, under their own names.",
            )
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise CorruptShard(f"{header.file.name} holds '{tensor.name}', as another file of the set does.")
            tensors[tensor.name] = tensor
    return GgufModel(tuple(headers), GgufFacts(headers[0], tensors))


def is_gguf(path: Path) -> bool:
    """By its suffix or by how it begins: files of Ollama have no suffix, nor those that the Hub's cache links to."""
    if path.suffix == SUFFIX:
        return True
    try:
        with path.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _set_of(file: Path) -> tuple[Path, ...]:
    match = SPLIT.fullmatch(file.name)
    if match is None:
        return (file,)
    count = int(match["count"])
    names = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not file.with_name(name).is_file()]
    if missing:
        raise BadModelDir(
            f"{file} is incomplete: {missing[0]} is missing{f', and {len(missing) - 1} more' if missing[1:] else ''}.",
            hint="all files of the set in one folder.",
        )
    return tuple(file.with_name(name) for name in names)


def _noted(folder: Path, kind: str) -> list[Path]:
    """Files that a folder of documents was made from: `files`, or the `own` documents beside them."""
    rows = read_json(folder / GGUF_NOTE).get(kind)
    return [Path(str(row[0])) for row in rows if isinstance(row, list) and row] if isinstance(rows, list) else []


def _documents(files: Sequence[Path], own: Sequence[Path]) -> Path:
    real = [file.resolve() for file in files]
    note: dict[str, Json] = {"version": VERSION, "files": _stamps(real), "own": _stamps(own)}
    key = hashlib.sha256("\n".join(map(str, [*real, *own])).encode()).hexdigest()[:12]
    folder = folder_of("cache") / "gguf" / f"{files[0].name.removesuffix('.gguf')}-{key}"
    if (folder / GGUF_NOTE).is_file() and read_json(folder / GGUF_NOTE) == note:
        return folder
    written = _of_gguf if is_gguf(real[0]) else _of_consolidated
    made = {**written(real, own), **{file.name: file.read_bytes() for file in own if file.name in OWN_DOCUMENTS}}
    made[GGUF_NOTE] = _json(note)  # which makes the folder one of documents
    try:
        _replace(folder, made)
    except OSError as error:
        hint = "SPECEXEC_HOME with a folder on a disk that can be written."
        what = f"the documents of {files[0].name} cannot be written to {folder}: {error.strerror}."
        raise (DiskFull if error.errno == errno.ENOSPC else BadModelDir)(what, None, hint) from error
    return folder


def _stamps(files: Sequence[Path]) -> list[Json]:
    return [[str(file), *_stamp(file)] for file in files]


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _of_gguf(files: Sequence[Path], own: Sequence[Path]) -> dict[str, bytes]:
    """Every document of a GGUF model by its name."""
    model = open_gguf(files, LISTS)
    config = config_of(model.facts)
    if any(tensor.kind.plain is None for tensor in model.facts.tensors.values()):
        config["quantization_config"] = {"quant_method": "gguf"}
    # What is kept of a model from run to run depends on this document: two files must not have the same.
    config["gguf_files"] = [[header.file.name, *_stamp(header.file)] for header in model.headers]
    taken = {file.name for file in own}
    documents = {} if "tokenizer.json" in taken else tokenizer_documents(model.headers[0])
    return {CONFIG: _json(config)} | {
        name: _json(content) if isinstance(content, dict) else content.encode() for name, content in documents.items()
    }


def _of_consolidated(files: Sequence[Path], own: Sequence[Path]) -> dict[str, bytes]:
    """Every document of a model in Mistral's own layout by its name."""
    beside = {file.name: file for file in own}
    config = consolidated.config_of(read_json(beside[PARAMS]), str(beside[PARAMS]))
    config["consolidated_files"] = [[file.name, *_stamp(file)] for file in files]
    documents: dict[str, dict[str, Json]] = {}
    if "tokenizer.json" not in beside:
        if TEKKEN not in beside:
            raise BadModelDir(
                f"{beside[PARAMS].parent} holds neither {TEKKEN} nor tokenizer.json.",
                "Without one of them text cannot be read.",
                "the file of the same model, beside its weights.",
            )
        documents = tekken_documents(read_json(beside[TEKKEN]), str(beside[TEKKEN]))
    return {CONFIG: _json(config)} | {name: _json(content) for name, content in documents.items()}


def _json(content: dict[str, Json]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _replace(folder: Path, made: dict[str, bytes]) -> None:
    """The folder with these files instead of whatever it holds, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    old = draft.with_suffix(".old")
    try:
        for name, content in made.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(draft, folder)
        except OSError:
            if not (folder / GGUF_NOTE).is_file():  # else another process was quicker, with the same documents
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
