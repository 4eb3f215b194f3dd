"""Ctrl-C is never lost, wherever Python is when it comes."""

from __future__ import annotations

import signal
import threading
import weakref

import pytest

from cli.shared.errors import INTERRUPTED
from cli.terminal.interrupts import Interrupts
from tests.held import started_since


class Thing:
    """Something that is collected."""


def test_a_press_inside_a_finalizer_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    stopped: list[str] = []
    with Interrupts(lambda: stopped.append("stop"), lambda: None) as interrupts:
        signal.raise_signal(signal.SIGINT)
        thing = Thing()
        watch = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing  # the second press comes here, and Python drops what its handler raises
        assert watch() is None
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()
    assert set(stopped) == {"stop"}
    assert capsys.readouterr().err == ""


def test_a_press_before_the_engine_has_begun_is_not_forgotten() -> None:
    """The decoder forgets a stop that comes before a text has joined: it may have been meant for the one before."""
    before = {*threading.enumerate()}
    began, heard = threading.Event(), threading.Event()

    def stop() -> None:
        if began.is_set():
            heard.set()

    with Interrupts(stop, lambda: None):
        signal.raise_signal(signal.SIGINT)
        began.set()
        assert heard.wait(60)
    assert started_since(before) == set()


def test_a_second_press_while_the_first_still_starts_its_thread_ends_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt), Interrupts(lambda: None, lambda: None):
        signal.raise_signal(signal.SIGINT)


def test_the_third_press_leaves_the_program() -> None:
    with Interrupts(lambda: None, lambda: None):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
            signal.raise_signal(signal.SIGINT)
    assert isinstance(left.value, SystemExit), "not a second abandoned sweep"
    assert left.value.code == INTERRUPTED


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(lambda: None, lambda: None):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
