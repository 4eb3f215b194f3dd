"""A conversation that is left can be continued: nothing said is lost, and nothing read is read again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import specexec
from cli.chat.archive import Archive
from cli.chat.saving import Keeper
from cli.engine.prefix_store import PrefixStore
from cli.shared.errors import BadSession, SessionNotFound
from cli.terminal.screen import Screen
from offload.hub.names import HERE
from offload.machine.atomic_write import replacing
from specexec.engine.engine import Engine
from specexec.engine.prefixes import NoPrefixes
from specexec.errors import ContextLengthExceeded
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Cost
from specexec.text.conversation import Conversation
from specexec.text.messages import Message
from specexec.tree.tree import TokenTree
from tests.tiny import tiny
from tests.writing import rows_read

WARM = SamplingParams(temperature=1, seed=5, max_tokens=24)
LONG = "word " * 1500
STOPPED = Burst((), "", "interrupted", TokenTree.empty(), (), 5, Cost())


def random_model(folder: Path, layers: int, heads: int) -> Path:
    """With a long context and the demo's tokenizer: its answers are no text that anyone would write."""
    tiny(
        "llama", folder, vocab_size=4096, max_position_embeddings=32768, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=(heads + 1) // 2, eos_token_id=3,
    )  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(HERE / "demo" / "target" / file, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("random"), layers=2, heads=4)


def opened(folder: Path, tmp_path: Path, ctx: int = 8192) -> Engine:
    """An engine of a run that keeps conversations."""
    engine = specexec.load(str(folder), drafter="none", ctx=ctx)
    engine.prefixes = PrefixStore.of(engine, tmp_path / "prefixes")
    return engine


@pytest.fixture
def llm(folder: Path, tmp_path: Path) -> Iterator[Engine]:
    with opened(folder, tmp_path) as engine:
        yield engine


def say(talk: Conversation, text: str, sampling: SamplingParams = WARM) -> str:
    return "".join(burst.text for burst in talk.send(text, sampling))


def keeper(archive: Archive, engine: Engine, talk: Conversation, id: str | None = None) -> Keeper:
    record = archive.load(id) if id else archive.new("random")
    return Keeper(archive, record, engine, talk, Screen())


@pytest.fixture(scope="module")
def left_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keeper]:
    place = tmp_path_factory.mktemp("left")
    with opened(folder, place) as engine:
        talk = engine.conversation("Be brief.")
        kept = keeper(Archive(place), engine, talk)
        say(talk, LONG)
        say(talk, LONG)
        kept.leave()
    return place, kept


@pytest.fixture
def left(left_once: tuple[Path, Keeper], tmp_path: Path) -> Keeper:
    """A conversation of two long turns, left by a process that is gone; each test has a copy of its files."""
    place, kept = left_once
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    return Keeper(Archive(tmp_path), kept.record, kept._engine, kept.conversation, Screen())


def test_going_on_reads_no_old_token_again(
    llm: Engine, left: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = llm.conversation()
    keeper(Archive(tmp_path), llm, talk, left.id).resume()
    known = llm.prefixes.known(talk.keep().turns[-1].tokens)
    assert known > 3000
    assert f"4 messages; {known:,} tokens need not be read again".replace(",", " ") in capsys.readouterr().err
    read = rows_read(llm._target, monkeypatch)
    say(talk, "And now?")
    prompt = talk._turns[-1].prompt
    # The last token of an answer is never read before the next turn: it is where that turn begins.
    assert read[0] == len(prompt) - known
    assert read[0] < 20


def test_a_conversation_of_20_000_tokens_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_model(tmp_path / "model", layers=1, heads=1)  # of two layers and four heads it takes half a minute
    archive, briefly = Archive(tmp_path), SamplingParams(temperature=1, seed=5, max_tokens=2)
    with opened(folder, tmp_path, 24000) as engine:
        talk = engine.conversation()
        kept = keeper(archive, engine, talk)
        say(talk, "word " * 20_000, briefly)
        kept.leave()
    with opened(folder, tmp_path, 24000) as engine:
        talk = engine.conversation()
        keeper(archive, engine, talk, kept.id).resume()
        read = rows_read(engine._target, monkeypatch)
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


def test_keys_and_values_of_an_earlier_state_are_used_as_far_as_they_go(
    llm: Engine, left: Keeper, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, talk = Archive(tmp_path), llm.conversation()
    llm.prefixes = NoPrefixes()
    kept = keeper(archive, llm, talk, left.id)
    kept.resume()
    say(talk, LONG)
    kept.leave()
    llm.prefixes = PrefixStore.of(llm, tmp_path / "prefixes")
    again = llm.conversation()
    keeper(archive, llm, again, left.id).resume()
    read = rows_read(llm._target, monkeypatch)
    assert say(again, "And now?") == say(talk, "And now?")
    assert 1500 < read[0] < 1600


@pytest.mark.parametrize("state", ["whole", "damaged", "deleted"])
def test_the_next_answer_is_the_same_whatever_became_of_keys_and_values(
    llm: Engine, left: Keeper, tmp_path: Path, state: str
) -> None:
    """The ids of a conversation are in its file: this model's answers are split as no tokenizer would split them."""
    resumed, unbroken = llm.conversation(), llm.conversation("Be brief.")
    path = sorted((tmp_path / "prefixes").glob("*/*.safetensors"))[3]
    if state == "damaged":
        path.write_bytes(path.read_bytes()[:-7] + b"changed")
    elif state == "deleted":
        path.unlink()
    keeper(Archive(tmp_path), llm, resumed, left.id).resume()
    say(unbroken, LONG)
    say(unbroken, LONG)
    assert resumed.keep().turns == unbroken.keep().turns
    assert say(resumed, "And now?") == say(unbroken, "And now?")
    assert resumed.undo()
    assert resumed.undo()
    assert unbroken.undo()
    assert unbroken.undo()
    assert say(resumed, "Else?") == say(unbroken, "Else?")
    assert resumed.keep().turns == unbroken.keep().turns


def test_an_answer_goes_on_in_another_run(llm: Engine, tmp_path: Path) -> None:
    archive, whole, cut = Archive(tmp_path), llm.conversation(), llm.conversation()
    some, more = (SamplingParams(temperature=1, seed=5, max_tokens=size, ignore_eos=True) for size in (10, 20))
    say(whole, "Say something.", replace(some, max_tokens=30))
    kept = keeper(archive, llm, cut)
    say(cut, "Say something.", some)
    kept.save()
    again = llm.conversation()
    keeper(archive, llm, again, kept.id).resume()
    assert again.can_proceed
    list(again.proceed(replace(more, seed=None)))
    assert again.messages == whole.messages


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
    read = rows_read(llm._target, monkeypatch)
    say(talk, "Another thing.")
    assert read[0] < 60


def test_a_conversation_is_its_owners_alone(tmp_path: Path, left: Keeper) -> None:
    (file,) = tmp_path.glob("*.jsonl")
    assert file.stat().st_mode & 0o777 == 0o600


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


def test_a_conversation_without_a_word_is_not_kept(llm: Engine, tmp_path: Path) -> None:
    keeper(Archive(tmp_path), llm, llm.conversation()).leave()
    assert list(tmp_path.rglob("*.*")) == []


SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\reight\r\nnine"


def test_a_conversation_of_any_line_separators_can_be_read_again(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    said: tuple[Message, ...] = ({"role": "user", "content": SEPARATORS}, {"role": "assistant", "content": SEPARATORS})
    kept = archive.save(replace(archive.new("demo"), system=SEPARATORS, messages=said))
    assert archive.load(kept.id) == kept


def test_two_who_go_on_with_one_conversation_lose_nothing(
    llm: Engine, left: Keeper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, talks = Archive(tmp_path), [llm.conversation(), llm.conversation()]
    both = [keeper(archive, llm, talk, left.id) for talk in talks]
    for one in both:
        one.resume()
    for turn in range(2):
        for number, (one, talk) in enumerate(zip(both, talks, strict=True)):
            say(talk, f"turn {turn} of {number}")
            one.save()
    for one, talk in zip(both, talks, strict=True):
        one.leave()
        assert [*archive.load(one.id).messages] == talk.messages
    assert both[0].id == left.id != both[1].id
    said = f"Note: {left.id} was continued elsewhere; this conversation is kept as {both[1].id}.\n"
    assert capsys.readouterr().err.count(said) == 1


def test_what_was_taken_back_or_replaced_stays_in_the_file(llm: Engine, tmp_path: Path) -> None:
    archive, talk = Archive(tmp_path), llm.conversation("Be brief.")
    kept = keeper(archive, llm, talk)
    said = []
    for change in (lambda: say(talk, "one"), lambda: list(talk.retry(WARM)), talk.undo, lambda: say(talk, "two")):
        change()
        kept.save()
        said.append([*talk.messages])
    talk.system = "Be long."
    kept.save()
    (first, again, _, _), record = said, archive.load(kept.id)
    assert [*record.messages] == talk.messages
    assert [(one.after, [*one.messages]) for one in record.taken_back] == [
        (1, first[1:]), (0, again), (0, [{"role": "system", "content": "Be brief."}]),
    ]  # fmt: skip


def test_a_stop_before_the_first_token_leaves_no_empty_answer(llm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, unbroken = llm.conversation(), llm.conversation()
    say(talk, "First.")
    before = [*talk.messages]
    stopped = talk.send("Stopped.", WARM)
    monkeypatch.setattr(llm, "stream", lambda *_: iter([STOPPED]))
    assert [burst.finish_reason for burst in stopped] == ["interrupted"]
    monkeypatch.undo()
    assert (talk.messages, talk.unanswered) == (before, "Stopped.")
    say(unbroken, "First.")
    assert "".join(burst.text for burst in talk.retry(WARM)) == say(unbroken, "Stopped.")
    assert talk.messages == unbroken.messages
    assert talk.unanswered is None


def test_an_error_before_the_first_token_does_the_same(llm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[Burst]:
        raise KeyboardInterrupt
        yield STOPPED

    talk = llm.conversation()
    monkeypatch.setattr(llm, "stream", fails)
    with pytest.raises(KeyboardInterrupt):
        say(talk, "Stopped.")
    assert (talk.messages, talk.unanswered) == ([], "Stopped.")
    assert talk.undo()
    assert talk.unanswered is None


def test_an_empty_answer_in_an_old_file_is_not_read_by_the_model(
    llm: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(role: str, content: str) -> Message:
        return {"role": role, "content": content}

    archive, talk = Archive(tmp_path), llm.conversation()
    said = [message("user", "a"), message("assistant", ""), message("user", "b"), message("assistant", "B")]
    old = archive.save(replace(archive.new("random"), messages=tuple(said)))
    kept = keeper(archive, llm, talk, old.id)
    kept.resume()
    assert talk.messages == said[2:]
    assert "Note: 1 of its questions got no answer; the model does not read them.\n" in capsys.readouterr().err
    say(talk, "c")
    kept.save()
    assert [[*one.messages] for one in archive.load(old.id).taken_back] == [said[:2]]


@pytest.mark.parametrize(
    "text",
    [b"\xff\n", b"[" * 100_000, b'{"specexec_session": 1, "model": "m", "created": 1}\n' + b'{"a":' * 100_000, b"null",
     b'{"specexec_session": 1, "model": "m", "created": 1}\n3\n',
     b'{"specexec_session": 1, "model": "m", "created": 1e999}\n',
     b'{"specexec_session": 1, "model": "m", "created": 1}\n{"role": "assistant", "content": "x", "tokens": '
     b'{"kept": 0, "read": [1], "written": [4611686018427387000], "ended": "stop", "seed": 1}}\n'],
)  # fmt: skip
def test_a_damaged_file_is_named_and_ends_no_listing(tmp_path: Path, text: bytes) -> None:
    archive = Archive(tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(text)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadSession, match=re.escape(str(tmp_path / "bad.jsonl"))):
        archive.load("bad")
    assert [type(one) for one in archive.everything()] == [BadSession] * 3
    with pytest.raises(BadSession):
        archive.latest()
