"""Files, folders and standard input become items: every line and every file gives exactly one, good or bad."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cli.batch.input.form import Form
from cli.batch.input.items import Item
from cli.batch.input.lines import item_of_line
from cli.batch.output.journal import RECORDS, Beside
from cli.batch.refusals import DuplicateId, UnreadableFile
from specexec.errors import BadText, SpecexecError

STDIN = "-"
LINES = ".jsonl"
# What is taken from a folder; anything else there (pictures, backups, results) is counted and left.
KNOWN = (".jsonl", ".md", ".markdown", ".txt")
BOM = b"\xef\xbb\xbf"

Split = Literal["file", "lines", "blank"]


@dataclass(frozen=True)
class InputShard:
    """Part K of N: every N-th item, so that parts of a sorted input take about equally long."""

    part: int = 1
    of: int = 1


@dataclass(frozen=True)
class Inputs:
    """All items of a run in input order, and how many files of a folder were left."""

    items: list[Item]
    skipped: int = 0


def read_inputs(
    prompts: Sequence[str],
    paths: Sequence[str],
    form: Form,
    *,
    split: Split = "file",
    limit: int | None = None,
    shard: InputShard = InputShard(),
    dedupe: bool = False,
) -> Inputs:
    """The items of this run. Ids are unique: an item that repeats one carries that as its problem.

    With `dedupe` an item that asks the same as an earlier one says so, whichever shard the earlier one is in.
    """
    files, left = _files(paths)
    found = _unique(_all(prompts, files, form, split))
    numbered = [replace(item, index=index) for index, item in enumerate(found)][:limit]
    numbered = list(_deduped(numbered)) if dedupe else numbered
    return Inputs(numbered[shard.part - 1 :: shard.of], left)


def _all(prompts: Sequence[str], files: Sequence[str], form: Form, split: Split) -> Iterator[Item]:
    for number, prompt in enumerate(prompts, start=1):
        yield _item(f"prompt:{number}", prompt, form)
    for name in files:
        if name == STDIN:
            yield from _from_bytes("stdin", _stdin(), form, split, piped=True)
        else:
            yield from _from_file(name, form, split)


def _files(paths: Sequence[str]) -> tuple[list[str], int]:
    """The paths, inputs of a folder in its place; and how many other files were left there."""
    names: list[str] = []
    left = 0
    for path in paths:
        folder = Path(path)
        if path == STDIN or not folder.is_dir():
            names.append(path)
            continue
        found = _below(folder)
        wanted = [str(file) for file in found if _wanted(file, folder)]
        names += wanted
        left += len(found) - len(wanted)
    return names, left


def _below(folder: Path) -> list[Path]:
    """Everything in a folder and below that is not hidden, in the order of names."""
    found = (file for file in folder.rglob("*") if not file.is_dir())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _wanted(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is an input; a link that leads nowhere is one, and its item says so."""
    return file.suffix in KNOWN and (file.is_file() or not file.exists()) and not _is_result(file, folder)


def _is_result(file: Path, folder: Path) -> bool:
    """Whether a run has written it: results that lie among their prompts must not be asked when it is resumed."""
    below = [parent / RECORDS for parent in file.parents if folder in parent.parents]
    return any(Beside(records).manifest.exists() for records in (file, *below))


def _stdin() -> bytes:
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode("utf-8", "surrogateescape") if buffer is None else buffer.read()


def _from_file(name: str, form: Form, split: Split) -> Iterator[Item]:
    file = Path(name)
    try:
        piped, content = file.is_fifo(), file.read_bytes()
    except OSError as problem:
        yield Item(name, problem=UnreadableFile(f"{name} cannot be read: {problem.strerror}."))
        return
    yield from _from_bytes(name, content, form, split, piped=piped)


def _from_bytes(name: str, content: bytes, form: Form, split: Split, *, piped: bool) -> Iterator[Item]:
    """What comes through a pipe has no name that says JSON lines, so its first letter decides."""
    content = content.removeprefix(BOM)
    if Path(name).suffix == LINES or (piped and split == "file" and content.lstrip()[:1] == b"{"):
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                yield item_of_line(line, f"{name}:{number}", form)
        return
    try:
        text = content.decode()
    except UnicodeDecodeError:
        yield Item(name, problem=BadText(f"{name} is not UTF-8 text."))
        return
    if split == "file":
        yield _item(name, text.removesuffix("\n").removesuffix("\r"), form)
        return
    for number, part in _parts(text, split):
        yield _item(f"{name}:{number}", part, form)


def _parts(text: str, split: Split) -> Iterator[tuple[int, str]]:
    """Lines, or blocks between blank lines, each with the number of its first line; empty ones do not count."""
    number = 1
    for part in re.split(r"(\r?\n)" if split == "lines" else r"(\r?\n(?:[ \t]*\r?\n)+)", text):
        if part.strip():
            yield number + len(part) - len(part.lstrip("\n")), part.strip("\r\n")
        number += part.count("\n")


def _item(name: str, text: str, form: Form) -> Item:
    try:
        return Item(name, form.prompt(text, name))
    except SpecexecError as problem:
        return Item(name, problem=problem)


def _unique(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; from the second use of an id on it is a problem, recorded under a name of its own."""
    taken: set[str] = set()
    for item in items:
        if item.id not in taken:
            taken.add(item.id)
            yield item
            continue
        number = 2
        while f"{item.id}#{number}" in taken:
            number += 1
        name = f"{item.id}#{number}"
        taken.add(name)
        yield Item(name, problem=item.problem or DuplicateId(f"{item.id}: this id was used before in the input."))


def _deduped(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; those that ask for what another one has asked for name it."""
    first: dict[str, str] = {}
    for item in items:
        original = item.id if item.problem else first.setdefault(item.prompt_sha, item.id)
        yield item if original == item.id else replace(item, duplicate_of=original)
