"""Ctrl-C is never lost, wherever Python is when it comes."""

from __future__ import annotations

import signal
import weakref

import pytest

from cli.interrupts import Interrupts


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
    assert stopped == ["stop"]
    assert capsys.readouterr().err == ""


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(lambda: None, lambda: None):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
