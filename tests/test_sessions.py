"""A conversation that is left can be gone on with: nothing said is lost, and nothing read is read again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import specexec
from cli.archive import Archive
from cli.errors import BadSession, SessionNotFound
from cli.keeping import Keeper
from cli.screen import Screen
from cli.snapshot import fingerprint
from offload.names import HERE
from offload.replacing import replacing
from specexec.cache import KVCache
from specexec.conversation import Conversation
from specexec.engine import Engine
from specexec.errors import ContextLengthExceeded
from specexec.lm import Rows, Sweep
from specexec.sampling import SamplingParams
from tests.tiny import tiny

WARM = SamplingParams(temperature=1, seed=5, max_tokens=24)
LONG = "word " * 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a long context and the demo's tokenizer: its answers are no text that anyone would write."""
    folder = tmp_path_factory.mktemp("random")
    tiny("llama", folder, vocab_size=4096, max_position_embeddings=32768, num_hidden_layers=2, eos_token_id=3)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(HERE / "demo" / "target" / file, folder)
    return folder


@pytest.fixture
def llm(folder: Path) -> Iterator[Engine]:
    with specexec.load(str(folder), drafter="none", ctx=8192) as engine:
        yield engine


def say(talk: Conversation, text: str, sampling: SamplingParams = WARM) -> str:
    return "".join(burst.text for burst in talk.send(text, sampling))


def keeper(archive: Archive, engine: Engine, talk: Conversation, id: str | None = None) -> Keeper:
    record = archive.load(id) if id else archive.new("random")
    return Keeper(archive, record, engine, talk, Screen())


def rows_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, how many tokens the target reads in each sweep."""
    read: list[int] = []
    begin = engine._target.begin

    def counted(parts: list[Rows]) -> Sweep:
        read.append(sum(len(part.tokens) for part in parts))
        return begin(parts)

    monkeypatch.setattr(engine._target, "begin", counted)
    return read


@pytest.fixture
def left(folder: Path, tmp_path: Path) -> Keeper:
    """A conversation of two long turns, left by a process that is gone."""
    archive = Archive(tmp_path)
    with specexec.load(str(folder), drafter="none", ctx=8192) as engine:
        talk = engine.conversation("Be brief.")
        kept = keeper(archive, engine, talk)
        say(talk, LONG)
        say(talk, LONG)
        kept.leave()
    return kept


def test_going_on_reads_no_old_token_again(
    llm: Engine, left: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = llm.conversation()
    keeper(Archive(tmp_path), llm, talk, left.id).resume()
    known = len(talk.keep().caches["target"])
    assert known > 3000
    assert f"4 messages; {known:,} tokens need not be read again".replace(",", " ") in capsys.readouterr().err
    read = rows_of(llm, monkeypatch)
    say(talk, "And now?")
    prompt = talk._turns[-1].prompt
    # The last token of an answer is never read before the next turn: it is where that turn begins.
    assert read[0] == len(prompt) - known
    assert read[0] < 20


def test_a_conversation_of_20_000_tokens_is_read_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, briefly = Archive(tmp_path), SamplingParams(temperature=1, seed=5, max_tokens=2)
    with specexec.load(str(folder), drafter="none", ctx=24000) as engine:
        talk = engine.conversation()
        kept = keeper(archive, engine, talk)
        say(talk, "word " * 20_000, briefly)
        kept.leave()
    with specexec.load(str(folder), drafter="none", ctx=24000) as engine:
        talk = engine.conversation()
        keeper(archive, engine, talk, kept.id).resume()
        read = rows_of(engine, monkeypatch)
        say(talk, "And now?", briefly)
        assert len(talk._turns[-1].prompt) > 20_000
        assert read[0] < 20


def test_going_on_writes_what_would_have_been_written_without_a_break(
    llm: Engine, left: Keeper, tmp_path: Path
) -> None:
    resumed, unbroken = llm.conversation(), llm.conversation("Be brief.")
    keeper(Archive(tmp_path), llm, resumed, left.id).resume()
    say(unbroken, LONG)
    say(unbroken, LONG)
    assert resumed.messages == unbroken.messages
    assert say(resumed, "And now?") == say(unbroken, "And now?")


def refused(llm: Engine, left: Keeper, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said when the snapshot cannot be used; the conversation must go on all the same."""
    talk = llm.conversation()
    keeper(Archive(folder), llm, talk, left.id).resume()
    assert len(talk.messages) == 4
    assert not talk._caches
    said = capsys.readouterr().err
    assert "it is read again with the next message" in said
    return said.partition("not used: ")[2].splitlines()[0]


def test_a_damaged_snapshot_is_refused_and_the_conversation_goes_on(
    llm: Engine, left: Keeper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Archive(tmp_path).snapshot_path(left.id)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refused(llm, left, tmp_path, capsys).endswith("is damaged.")
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(llm, left, tmp_path, capsys).startswith("it is damaged")
    path.write_bytes(b"")
    assert refused(llm, left, tmp_path, capsys).startswith("it is damaged")


def test_a_snapshot_of_another_model_is_refused(
    llm: Engine, left: Keeper, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other = tmp_path / "other"
    tiny("llama", other, seed=1, vocab_size=4096, max_position_embeddings=32768, num_hidden_layers=2, eos_token_id=3)
    assert fingerprint(other) != fingerprint(folder)
    monkeypatch.setattr(llm, "folders", {"target": other})
    assert refused(llm, left, tmp_path, capsys) == "it was made with another model."


def test_a_snapshot_that_missed_the_last_turn_is_refused(
    llm: Engine, left: Keeper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Archive(tmp_path).snapshot_path(left.id)
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        marks = file.metadata()
    save_file(arrays, path, {**marks, "conversation": marks["conversation"].replace("Be brief.", "Be long.")})
    assert refused(llm, left, tmp_path, capsys) == "it belongs to an earlier state of the conversation."


def test_an_answer_that_was_cut_goes_on_as_if_it_had_not_been(llm: Engine) -> None:
    whole, cut = llm.conversation(), llm.conversation()
    say(whole, "Say something.", SamplingParams(temperature=1, seed=5, max_tokens=30, ignore_eos=True))
    say(cut, "Say something.", SamplingParams(temperature=1, seed=5, max_tokens=10, ignore_eos=True))
    assert cut.can_proceed
    list(cut.proceed(SamplingParams(temperature=1, max_tokens=20, ignore_eos=True)))
    assert cut.messages == whole.messages


def test_only_a_cut_answer_can_go_on() -> None:
    with specexec.load("demo", budget=16) as engine:
        talk = engine.conversation()
        assert not talk.can_proceed
        say(talk, "What is a drafter?", SamplingParams(temperature=0))
        assert not talk.can_proceed
        assert list(talk.proceed()) == []


def test_a_question_that_is_refused_changes_nothing(llm: Engine) -> None:
    talk = llm.conversation()
    say(talk, "Short.")
    before = [*talk.messages]
    refused_bursts = talk.send("word " * 9000, WARM)  # refused when it is read, where the screen can say so
    with pytest.raises(ContextLengthExceeded):
        next(refused_bursts)
    assert talk.messages == before


def test_taking_back_a_question_reads_nothing_again_either(llm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = llm.conversation()
    say(talk, LONG)
    say(talk, "Something else.")
    talk.undo()
    read = rows_of(llm, monkeypatch)
    say(talk, "Another thing.")
    assert read[0] < 60


def test_a_conversation_is_its_owners_alone(tmp_path: Path, left: Keeper) -> None:
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".jsonl", ".safetensors"]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_conversations_are_found_by_the_beginning_of_their_id(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    for name in ("0612-a", "0612-b", "0701-c"):
        archive.save(archive.new("demo").__class__(name, "demo", messages=({"role": "user", "content": name},)))
    assert archive.load("07").title == "0701-c"
    assert archive.latest().id == "0701-c"
    for wrong in ("06", "08", "", "../x"):
        with pytest.raises(SessionNotFound):
            archive.load(wrong)
    (tmp_path / "torn.jsonl").write_text('{"specexec_session": 1, "mod')
    assert sum(isinstance(one, BadSession) for one in archive.everything()) == 1


def test_an_empty_cache_keeps_no_snapshot(tmp_path: Path) -> None:
    with specexec.load("demo") as engine:
        talk = engine.conversation()
        kept = keeper(Archive(tmp_path), engine, talk)
        kept.leave()
    assert list(tmp_path.iterdir()) == []
    assert not KVCache().layers
