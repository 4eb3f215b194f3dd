"""What was written is remembered by the next run, whole or not at all, and can be forgotten."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import specexec
from cli.app import main
from cli.engine import ngram_store as recall
from cli.engine.ngram_store import corpus_path, past_path, recalling, save
from cli.models import index as cli_index
from specexec import SamplingParams
from specexec.compose.load import encoding_of
from specexec.engine.engine import Engine

SAMPLING = SamplingParams(temperature=0.0, max_tokens=24)
TOKENIZER = encoding_of("demo").tokenizer
PAST = "The with statement is used to"


def sweeps(drafter: str = "ngram") -> int:
    """Sweeps of one answer, in a run that recalls earlier ones."""
    with specexec.load("demo", drafter=drafter, offload="none", dtype="f32", budget=32) as llm, recalling(llm):
        return llm.generate(PAST, SAMPLING).sweeps


def test_a_second_run_knows_what_the_first_one_wrote() -> None:
    first = sweeps()
    assert past_path(TOKENIZER, "demo").is_file()
    assert sweeps() < first
    assert oct(past_path(TOKENIZER, "demo").stat().st_mode)[-3:] == "600"


def test_a_run_without_retrieval_leaves_nothing_behind() -> None:
    sweeps("none")
    assert not past_path(TOKENIZER, "demo").exists()


def test_an_indexed_text_is_guessed_and_can_be_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with specexec.load("demo", drafter="none", offload="none", dtype="f32") as llm:
        text = llm.generate(PAST, SAMPLING).text
    plain = sweeps()
    recall.forget(TOKENIZER)
    (tmp_path / "quoted.txt").write_text(PAST + text)
    assert main(["index", str(tmp_path / "quoted.txt")]) == 0
    assert "indexed 1 files" in capsys.readouterr().err
    assert sweeps() < plain
    assert main(["index", "--forget"]) == 0
    assert not corpus_path(TOKENIZER).exists()
    assert not past_path(TOKENIZER, "demo").exists()


def test_index_refuses_what_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    assert main(["index", str(tmp_path / "image.png")]) == 7
    assert "is not UTF-8 text (byte 0)" in capsys.readouterr().err
    assert main(["index"]) == 2


def test_an_index_is_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_index, "MOST_B", 30)
    (tmp_path / "one.txt").write_text("sixteen letters!")
    (tmp_path / "two.txt").write_text("and fifteen too")
    assert main(["index", str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]) == 7
    assert "31 B of text" in capsys.readouterr().err
    assert not corpus_path(TOKENIZER).exists()
    assert main(["index", str(tmp_path / "one.txt")]) == 0


def test_a_damaged_file_costs_a_note_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    past = past_path(TOKENIZER, "demo")
    past.parent.mkdir(parents=True)
    past.write_bytes(b"no arrays")
    with caplog.at_level(logging.WARNING):
        assert sweeps() > 0
    assert "cannot be read and is left out" in caplog.text
    assert sweeps() > 0  # and was replaced by a good one


def test_a_file_of_something_else_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    save(past_path(TOKENIZER, "demo"), {"other": np.zeros(3)})
    with caplog.at_level(logging.WARNING):
        sweeps()
    assert "holds something else" in caplog.text


TEXT = {"tokens": np.array([5, 6, 2**32 - 1], np.uint32), "order": np.array([0, 1], np.uint32)}
COUNTS = {"seen": np.zeros(3), "hit": np.zeros(3)}
BF16 = b'{"tokens":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "content",
    [b"", len(BF16).to_bytes(8, "little") + BF16 + b"12", len(DEEP).to_bytes(8, "little") + DEEP,
     {**TEXT, "tokens": np.zeros((2, 2))}, {**TEXT, "tokens": np.array([2**32 - 2, 5, 6], np.uint32)},
     {**TEXT, "tokens": np.array([-1, 5, 6])}, {**TEXT, "tokens": np.array([1.5, 5.0, 6.0])},
     {**TEXT, "order": np.array([0, 7], np.uint32)}, {**TEXT, "tokens": np.array([1j, 2, 3], np.complex64)}],
)  # fmt: skip
@pytest.mark.parametrize("which", [past_path, corpus_path])
def test_whatever_is_in_the_file_is_said_once_and_changes_no_text(
    which: Callable[..., Path], content: bytes | dict[str, NDArray[np.generic]], caplog: pytest.LogCaptureFixture,
    llm: Engine, without_a_file: str,
) -> None:  # fmt: skip
    path = which(TOKENIZER, "demo") if which is past_path else which(TOKENIZER)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, {**content, **COUNTS})
    assert llm.memory is not None
    llm.memory.forget_past()
    with caplog.at_level(logging.WARNING), recalling(llm):
        assert llm.generate(PAST, SAMPLING).text == without_a_file
    assert [str(path) in message for message in caplog.messages] == [True]


def test_a_folder_in_a_files_place_is_said_and_left(caplog: pytest.LogCaptureFixture, llm: Engine) -> None:
    path = past_path(TOKENIZER, "demo")
    path.mkdir(parents=True)
    with caplog.at_level(logging.WARNING), recalling(llm):
        llm.generate(PAST, SAMPLING)
    assert len(caplog.messages) == 1
    assert str(path) in caplog.text
    assert recall.forget(TOKENIZER) == []


def test_a_file_in_the_folders_place_is_said(caplog: pytest.LogCaptureFixture, llm: Engine) -> None:
    path = past_path(TOKENIZER, "demo")
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.write_text("no folder")
    with caplog.at_level(logging.WARNING), recalling(llm):
        llm.generate(PAST, SAMPLING)
    assert len(caplog.messages) == 1
    assert str(path.parent) in caplog.text


@pytest.fixture(scope="module")
def llm() -> Iterator[Engine]:
    with specexec.load("demo", drafter="ngram", offload="none", dtype="f32", budget=32) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def without_a_file(llm: Engine) -> str:
    """What it writes where nothing is recalled."""
    assert llm.memory is not None
    llm.memory.forget_past()
    return llm.generate(PAST, SAMPLING).text


def test_a_crash_while_saving_keeps_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    save(path, {"tokens": np.arange(3)})
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(path, {"tokens": np.arange(4)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
