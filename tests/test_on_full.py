"""--on-full: a conversation that outgrows the context goes on without its oldest turns, and says what is not read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import specexec
from cli.app import main
from cli.chat.archive import Archive
from cli.chat.command import chat
from cli.chat.room import ON_FULL, SUMMARISE, OnFull
from cli.chat.room import _summary as written_summary
from cli.chat.saving import Keeper
from cli.chat.session import Session
from cli.chat.slash import obey
from cli.shared.errors import BadSession, NoServer
from cli.terminal.screen import Screen
from offload.hub.names import HERE
from specexec.engine.engine import Engine
from specexec.sampling.params import SamplingParams
from specexec.text.conversation import Conversation
from specexec.text.messages import Message
from specexec.text.transcript import LeftOut
from tests.tiny import tiny

CONTEXT = 384
SAMPLING = SamplingParams(temperature=1, seed=5, max_tokens=24)
QUESTIONS = [f"Question {number}: " + "what then? " * 6 for number in range(9)]
SYSTEM: Message = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A random model: its answers follow from everything that it reads."""
    folder = tmp_path_factory.mktemp("random")
    tiny("llama", folder, vocab_size=4096, max_position_embeddings=CONTEXT, num_hidden_layers=2, eos_token_id=3)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(HERE / "demo" / "target" / file, folder)
    with specexec.load(str(folder), drafter="none") as engine:
        yield engine


def session(llm: Engine, on_full: OnFull, talk: Conversation | None = None) -> Session:
    talk = talk or llm.conversation(str(SYSTEM["content"]))
    return Session(llm, talk, Screen(plain=True), SAMPLING, on_full=on_full)


def answer(llm: Engine, messages: list[Message]) -> str:
    return "".join(burst.text for burst in llm.stream(messages, SAMPLING))


def asked_until_full(one: Session) -> LeftOut:
    for question in QUESTIONS:
        one.send(question)
        if one.conversation.left_out.messages:
            break
    return one.conversation.left_out


def test_the_oldest_turns_are_left_out_and_the_rest_is_answered_as_if_there_were_no_other(
    llm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    one = session(llm, "drop-oldest-turns")
    left_out = asked_until_full(one)
    said = one.conversation.messages
    assert [message["content"] for message in said[::2]] == QUESTIONS[: len(said) // 2], "all are kept"
    assert left_out.messages in range(2, len(said) - 1, 2)
    *read, last = one.conversation.messages[left_out.messages :]
    assert last["content"] == answer(llm, [SYSTEM, *read])
    shown = capsys.readouterr().err
    assert f"the context of {CONTEXT} tokens is nearly full: the model no longer reads the first" in shown
    assert f"  the model no longer reads the first {left_out.messages} of {len(said)} messages\n" in shown
    one.send("And now?")
    assert one.conversation.left_out == left_out, "half of the context was made free at once"


def test_a_summary_in_the_models_own_words_stands_in_front_of_what_is_left(
    llm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    one = session(llm, "summarise")
    left_out = asked_until_full(one)
    old, (first, *between, last) = (
        one.conversation.messages[: left_out.messages], one.conversation.messages[left_out.messages :],
    )  # fmt: skip
    wanted = SamplingParams(temperature=1, seed=5, max_tokens=CONTEXT // 8)
    summary = "".join(burst.text for burst in llm.stream([SYSTEM, *old, _asked(SUMMARISE)], wanted)).strip()
    assert (left_out.summary, bool(summary)) == (summary, True)
    in_front = f"(A summary of what we said before: {summary})\n\n{first['content']}"
    assert last["content"] == answer(llm, [SYSTEM, _asked(in_front), *between])
    said = capsys.readouterr().err
    assert "the model reads a summary of the first" in said
    assert left_out.summary.split()[0] in said
    again = session(llm, "summarise")
    again.conversation.messages = [*old]
    again.sampling = replace(SAMPLING, stop=(summary[1],))
    assert written_summary(again, len(old)) == summary, "what ends answers does not end a summary"


def _asked(text: str) -> Message:
    return {"role": "user", "content": text}


def test_a_kept_conversation_goes_on_without_what_was_left_out(llm: Engine, tmp_path: Path) -> None:
    one, archive = session(llm, "drop-oldest-turns"), Archive(tmp_path)
    assert isinstance(one.conversation, Conversation)
    one.keeper = Keeper(archive, archive.new("random"), llm, one.conversation, one.screen)
    left_out = asked_until_full(one)
    one.leave()
    record, again = archive.load(one.keeper.id), llm.conversation()
    assert (record.left_out, len(record.messages)) == (left_out, len(one.conversation.messages))
    assert [turn.tokens for turn in record.turns] == [turn.tokens for turn in one.conversation.keep().turns] != []
    Keeper(archive, record, llm, again, one.screen).resume()
    assert again.rendered == one.conversation.rendered
    texts = ["".join(burst.text for burst in talk.send("And now?", SAMPLING)) for talk in (again, one.conversation)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("left_out", "says"),
    [({"messages": 3, "summary": ""}, "leaves out messages that it does not have"), (3, "is no object")],
)
def test_a_session_that_leaves_out_what_cannot_be_is_refused(left_out: object, says: str, tmp_path: Path) -> None:
    head = {"specexec_session": 1, "id": "x", "model": "m", "system": None, "created": 1}
    lines = [{**head, "left_out": left_out}, {"role": "user", "content": "Hello."}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BadSession, match=says):
        Archive(tmp_path).load("x")


def test_what_is_taken_back_makes_room_for_what_was_left_out(llm: Engine) -> None:
    one = session(llm, "drop-oldest-turns")
    left_out = asked_until_full(one)
    while len(one.conversation.messages) > left_out.messages:
        obey(one, "/undo")
    assert one.conversation.left_out == LeftOut()
    assert "Question 0" in one.conversation.rendered


def test_nothing_is_left_out_unasked(llm: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    one = session(llm, "stop")
    assert asked_until_full(one) == LeftOut()
    assert f"the context is {CONTEXT}" in capsys.readouterr().err
    assert one.conversation.unanswered == QUESTIONS[-1]
    obey(one, "/on-full drop-oldest-turns")
    obey(one, "/retry")
    assert one.conversation.left_out.messages > 0
    assert one.conversation.messages[-2]["content"] == QUESTIONS[-1]


def test_a_question_that_fills_the_context_alone_is_refused_and_can_be_edited(
    llm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    one = session(llm, "summarise")
    one.send(QUESTIONS[0])
    before = one.conversation.rendered
    one.send("x " * CONTEXT)
    said = capsys.readouterr().err
    assert f"the context is {CONTEXT}" in said
    assert "nearly full" not in said, "the earlier turns are not given up for it"
    assert (len(one.conversation.messages), one.conversation.rendered) == (2, before)


def test_a_question_whose_room_cannot_be_counted_is_taken_back_alone(
    llm: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as by a server that is gone: what there was before stays."""
    one = session(llm, "drop-oldest-turns")
    one.send(QUESTIONS[0])
    before = [*one.conversation.messages]

    def gone(*_: object) -> int:
        raise NoServer("the server is gone.")

    monkeypatch.setattr(one.conversation, "_count", gone)
    one.ask_again(QUESTIONS[1])
    assert "the server is gone" in capsys.readouterr().err
    assert (one.conversation.messages, one.conversation.unanswered) == (before, QUESTIONS[1])


def test_an_edited_question_that_is_refused_leaves_the_summary(llm: Engine) -> None:
    one = session(llm, "summarise")
    left_out = asked_until_full(one)
    while len(one.conversation.messages) > left_out.messages + 2:
        obey(one, "/undo")
    before = one.conversation.rendered
    one.ask_again("x " * CONTEXT)
    assert (one.conversation.left_out, one.conversation.rendered) == (left_out, before)


def test_a_question_that_stood_alone_is_answered_again_with_what_was_before_it(llm: Engine) -> None:
    """A question that took all room and got no answer, taken back: /retry is about the one before it."""
    one = session(llm, "drop-oldest-turns")
    one.send(QUESTIONS[0])
    assert isinstance(one.conversation, Conversation)
    one.conversation.left_out, one.conversation.unanswered = LeftOut(2), QUESTIONS[1]
    kept = one.conversation.keep()
    obey(one, "/undo")
    assert one.conversation.left_out == LeftOut()
    again = llm.conversation()
    again.take_up(kept)
    list(again.retry(SAMPLING))
    assert QUESTIONS[0] in again.rendered


def test_another_model_reads_what_was_left_out_as_far_as_it_has_room(
    llm: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, copy, third = llm.folders["target"], tmp_path / "copy", tmp_path / "third"
    for other in (copy, third):
        shutil.copytree(folder, other)

    def shown(lines: list[str], *words: str) -> int:
        """How many of the prompts that are shown hold the first question."""
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *words, "-d", "none", "--on-full", "drop-oldest-turns", "-n", "24"]) == 0
        said = capsys.readouterr()
        return (said.out + said.err).count(QUESTIONS[0])

    assert shown([*QUESTIONS, "/show prompt", f"/model {copy}", "/show prompt", QUESTIONS[1]], str(folder)) == 1
    assert shown(["/show prompt"], "-c") == 0, "the same model has no more room than before"
    assert shown(["/show prompt"], "-c", "-m", str(third)) == 1


def test_a_longer_context_reads_what_was_left_out(llm: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, archive = session(llm, "drop-oldest-turns"), Archive(tmp_path)
    assert isinstance(one.conversation, Conversation)
    one.keeper = Keeper(archive, archive.new("random"), llm, one.conversation, one.screen)
    asked_until_full(one)
    one.leave()
    monkeypatch.setattr(llm, "context", 2 * CONTEXT)
    again = Keeper(archive, archive.load(one.keeper.id), llm, llm.conversation(), one.screen)
    again.resume()
    assert QUESTIONS[0] in again.conversation.rendered


def test_the_command_offers_what_the_session_knows() -> None:
    (option,) = (one for one in chat.params if one.name == "on_full")
    assert tuple(option.type.choices) == ON_FULL  # type: ignore[attr-defined]
