"""The file of results: whole lines only, one writer only, and one configuration only."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from cli.batch.input.items import Item
from cli.batch.output.answers import ItemAnswer
from cli.batch.output.files import replace_file
from cli.batch.output.formats import RecordWriter
from cli.batch.output.journal import Beside, Journal, open_journal
from cli.batch.output.manifest import Manifest
from cli.batch.output.partial import PartialFile
from cli.batch.refusals import DamagedOutput, Locked, ManifestMismatch, OutputRefused
from cli.openai.choice import Choice
from cli.shared.errors import OutputDiskFull, OutputFileExists
from offload.machine.atomic_write import replacing
from specexec.errors import EmptyPrompt
from specexec.stats import Completion
from specexec.text.formats import Piece

CONFIGURATION = Manifest.now({"--temperature": 0.7, "--seed": 7})
WRITER = RecordWriter("jsonl", "demo@1")


def item(name: str, prompt: str = "what?") -> Item:
    return Item(name, prompt)


def answer(text: str) -> Completion:
    tokens = tuple(text.encode())
    return Completion(0, text, tokens, "stop", 4, 7, 2, 8, 3, 100, 0.5)


def put(journal: Journal, *names: str) -> None:
    for name in names:
        said = answer(f"answer {name}")
        journal.put(WRITER.finished(item(name), ItemAnswer((said,), (Choice(0, piece=Piece(said.text)),))))


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_resumed_file_goes_on_after_its_last_line(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a", "b")
    with open_journal(path, CONFIGURATION, resume=True) as journal:
        assert (set(journal.done), journal.torn_B) == ({"a", "b"}, 0)
        put(journal, "c")
    assert ids(path) == ["a", "b", "c"]


@pytest.mark.parametrize("cut", [1, 2, 30, 250])
def test_a_torn_last_line_is_taken_off_and_its_item_is_not_done(path: Path, cut: int) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a", "b", "c")
    os.truncate(path, path.stat().st_size - cut)
    with open_journal(path, CONFIGURATION, resume=True) as journal:
        assert journal.torn_B > 0
        assert "c" not in journal.done
        put(journal, *(name for name in "abc" if name not in journal.done))
    assert ids(path) == ["a", "b", "c"]


def test_zeros_that_a_power_cut_left_are_taken_off(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a")
    with path.open("ab") as file:
        file.write(b"\0" * 512)
    with open_journal(path, CONFIGURATION, resume=True) as journal:
        assert set(journal.done) == {"a"}


def test_lines_of_another_program_are_not_deleted(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a")
    with path.open("ab") as file:
        file.write(b"my notes\nmore notes\n")
    before = path.read_bytes()
    with pytest.raises(DamagedOutput):
        open_journal(path, CONFIGURATION, resume=True)
    assert path.read_bytes() == before


def test_an_existing_file_is_neither_replaced_nor_continued_unasked(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a")
    with pytest.raises(OutputFileExists, match="already exists"):
        open_journal(path, CONFIGURATION)
    with open_journal(path, CONFIGURATION, overwrite=True) as journal:
        put(journal, "b")
    assert ids(path) == ["b"]


def test_another_configuration_is_refused_with_the_difference(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a")
    other = Manifest.now({"--temperature": 0.2, "--seed": 8})
    with pytest.raises(ManifestMismatch) as refusal:
        open_journal(path, other, resume=True)
    assert refusal.value.what.endswith(
        "out.jsonl was made with --temperature 0.7, this run has 0.2 (also differs: --seed)."
    )
    assert open_journal(path, CONFIGURATION, resume=True).done, "the refusal has let go of the file"


def test_a_configuration_is_the_same_after_it_was_written_down(path: Path) -> None:
    odd = {"--stop": ["a"], "--pairs": ((1, 0.5),), "--none": ()}
    with open_journal(path, Manifest.now(odd)) as journal:  # type: ignore[arg-type]  # tuples are not JSON
        put(journal, "a")
    with open_journal(path, Manifest.now(odd), resume=True) as journal:  # type: ignore[arg-type]
        assert set(journal.done) == {"a"}


def test_a_changed_prompt_under_an_old_id_is_refused(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a", "b")
    with open_journal(path, CONFIGURATION, resume=True) as journal:
        journal.check_prompts([item("a"), item("new")])
        with pytest.raises(ManifestMismatch, match="changed since: 1, first 'b'"):
            journal.check_prompts([item("a"), item("b", "what else?")])


def test_two_writers_are_kept_apart(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        with pytest.raises(Locked, match=rf"another specexec \(pid {os.getpid()}, started"):
            open_journal(path, CONFIGURATION, resume=True)
        put(journal, "a")
    assert ids(path) == ["a"]


def test_failed_items_are_forgotten_when_they_shall_be_tried_again(path: Path) -> None:
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "a")
        journal.put(WRITER.failed(item("bad"), EmptyPrompt("the prompt is empty.")))
    with open_journal(path, CONFIGURATION, resume=True) as journal:
        assert journal.done["bad"].failed
    with open_journal(path, CONFIGURATION, resume=True, retry_failed=True) as journal:
        assert set(journal.done) == {"a"}
        put(journal, "bad")
    assert ids(path) == ["a", "bad"]


def test_a_record_is_on_the_disk_before_the_next_is_begun(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut takes is what no fsync has seen."""
    safe: list[str] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        fsync(descriptor)
        safe[:] = ids(path)

    with open_journal(path, CONFIGURATION) as journal:
        monkeypatch.setattr(os, "fsync", seen)
        for name in "abc":
            put(journal, name)
            assert safe[-1] == name


def keep(path: Path, text: str) -> None:
    """As conversations and settings are written."""
    with replacing(path) as file:
        file.write(text.encode())


@pytest.mark.parametrize("write", [replace_file, keep])
def test_a_small_file_is_the_old_one_or_the_new_one(
    write: Callable[[Path, str], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, "old")
    states: list[tuple[str, str]] = []
    for place, name in ((os, "fsync"), (os, "replace"), (Path, "replace")):
        real = getattr(place, name)

        def seen(*arguments: object, name: str = name, real: Callable[..., None] = real) -> None:
            states.append((name, path.read_text()))
            real(*arguments)

        monkeypatch.setattr(place, name, seen)
    write(path, "new")
    assert states[:2] == [("fsync", "old"), ("replace", "old")], "whole on the disk before it takes the place"
    assert (path.read_text(), os.listdir(path.parent)) == ("new", [path.name])


def test_a_full_disk_leaves_whole_lines_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with open_journal(path, CONFIGURATION) as journal:
        put(journal, "one")
        budget = iter([5])

        def short(descriptor: int, line: bytes) -> int:
            if (left := next(budget, 0)) == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, line[:left])

        monkeypatch.setattr(os, "write", short)
        with pytest.raises(OutputDiskFull, match="No space left on device while writing 'two'"):
            put(journal, "two")
    assert ids(path) == ["one"]


def test_a_real_disk_that_is_full_is_survived(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        path = small / "out.jsonl"
        names = [f"item {number}" for number in range(1000)]
        with open_journal(path, CONFIGURATION) as journal, pytest.raises(OutputDiskFull, match="No space left"):
            put(journal, *names)
        written = ids(path)
        assert written == names[: len(written)]
        assert len(written) > 50
        subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
        with open_journal(path, CONFIGURATION, resume=True) as journal:
            put(journal, *(name for name in names if name not in journal.done))
        assert ids(path) == names
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_unfinished_answers_are_kept_for_the_same_prompt_and_configuration_only(path: Path) -> None:
    items = {name: item(name) for name in "abc"}
    partial = PartialFile(Beside(path).partial, CONFIGURATION.sha)
    sha = items["a"].prompt_sha
    others = {"b": ("another prompt", ((3,),)), "c": (sha, ((5,), ())), "z": ("gone", ((4,),))}
    partial.save({"a": (sha, ((1, 2),)), **others})
    assert partial.load(items) == {"a": ((1, 2),)}
    assert PartialFile(Beside(path).partial, "another configuration").load(items) == {}
    partial.save({})
    assert not Beside(path).partial.exists()


def test_a_damaged_side_file_costs_only_what_was_in_it(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Beside(path).partial.write_text('{"manifest": ')
    assert PartialFile(Beside(path).partial, CONFIGURATION.sha).load({"a": item("a")}) == {}
    assert "start again" in caplog.text


def test_a_disk_that_may_not_be_written_is_reported_by_the_output(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(lock: FileLock) -> None:
        raise OSError(errno.EROFS, "Read-only file system", lock.lock_file)

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(OutputRefused) as told:
        open_journal(path, CONFIGURATION)
    assert told.value.what == f"{path} cannot be written: Read-only file system."
    assert "-o" in str(told.value.hint)
    path.write_text("in the way")
    with pytest.raises(OutputRefused, match=r"folder.jsonl cannot be written: .*out.jsonl/in/a: Not a directory\."):
        open_journal(path / "in" / "a" / "folder.jsonl", CONFIGURATION)
