"""Small things that make a dialogue pleasant: change a question, take an answer along, be called when it is done."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import pytest

from cli.chat.session import Session
from cli.chat.slash import obey
from cli.terminal.answer import Answer, long_stats
from cli.terminal.screen import Screen
from specexec.sampling.params import SamplingParams
from specexec.stats import Overlap
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine


@pytest.fixture
def session() -> Session:
    engine = FakeEngine()
    talk = Session(engine, engine.conversation(), Screen(), SamplingParams())  # type: ignore[arg-type]  # a stand-in
    talk.screen.live = True
    return talk


def test_the_last_question_is_changed_and_asked_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.send("helo")
    monkeypatch.setattr("click.edit", lambda text, extension: text.replace("helo", "hello") + "\n")
    obey(session, "/edit-last")
    assert [message["content"] for message in session.conversation.messages] == ["hello", "echo: hello"]


def test_a_changed_question_that_is_refused_leaves_the_old_one(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.send("hello")
    monkeypatch.setattr("click.edit", lambda text, extension: "x" * 500)
    obey(session, "/edit-last")
    assert [message["content"] for message in session.conversation.messages] == ["hello", "echo: hello"]


@pytest.mark.parametrize("edited", [None, "", "hello\n"])
def test_an_unchanged_question_is_not_sent(
    session: Session, monkeypatch: pytest.MonkeyPatch, edited: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    session.send("hello")
    monkeypatch.setattr("click.edit", lambda text, extension: edited)
    obey(session, "/edit-last")
    assert "unchanged: nothing was sent to the model" in capsys.readouterr().err
    assert len(session.conversation.messages) == 2


def test_an_answer_or_its_code_goes_to_the_clipboard(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    def copied(line: str) -> str | None:
        capsys.readouterr()
        obey(session, line)
        code = capsys.readouterr().err.partition("\x1b]52;c;")[2].partition("\x07")[0]
        return base64.b64decode(code).decode() if code else None

    assert copied("/copy") is None
    session.send("x\n```py\nprint()\n```\n")
    assert copied("/copy") == "echo: x\n```py\nprint()\n```\n"
    assert copied("/copy code") == "print()\n"


def test_the_bell_rings_for_long_answers_only(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session.bell = True
    for seconds, rings in ((2.0, False), (12.0, True)):
        monkeypatch.setattr(
            "cli.chat.session.play", lambda *_, seconds=seconds, **__: replace(Answer(), seconds=seconds)
        )
        capsys.readouterr()
        session.send("hello")
        without_titles = re.sub(r"\x1b]0;.*?\x07", "", capsys.readouterr().err)
        assert ("\x07" in without_titles) is rings


def test_nothing_is_signalled_where_no_terminal_listens(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.title("x")
    screen.ring()
    assert not screen.copy("x")
    assert capsys.readouterr().err == ""


def test_versions_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads(CommandLine(capsys, monkeypatch, FakeEngine())("version", "--json").out)
    assert {"specexec", "Python", "torch"} <= set(told)


def test_long_stats_tell_what_overlap_hid() -> None:
    plain = Answer(tokens=9, sweeps=3, drafted=6, kept=(2, 2, 2), seconds=3.0)
    assert not any("meanwhile" in line for line in long_stats(plain, "disk"))
    ahead = replace(plain, overlap=Overlap(hits=2, misses=1, draft_s=0.3, ahead_s=0.4, used_s=0.1))
    assert (
        "  ahead      in 2 of 3 sweeps the text went where the drafter had drafted ahead: "
        "that hid about 25% of the drafting"
    ) in long_stats(ahead, "disk")
