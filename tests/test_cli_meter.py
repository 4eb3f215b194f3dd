"""The two live lines: how far this sweep is, and what all of them came to."""

from __future__ import annotations

import re

import pytest

from cli.terminal.meter import SweepMeter, bar, sparkline
from specexec.stats import Burst, Cost, Progress
from specexec.tree.tree import TokenTree
from tests.fake_engine import FakeEngine


def burst(tokens: int) -> Burst:
    return Burst((7,) * tokens, "x" * tokens, None, TokenTree.empty(), (), 1, Cost())


def test_bursts_are_summed_up_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cli.terminal.meter.time.monotonic", lambda: now)
    meter = SweepMeter(FakeEngine(), lambda: 31)
    for tokens in (1, 17, 1, 9):
        now += 2.0
        meter.next_sweep(burst(tokens))
    assert meter.lines().splitlines()[1] == "  ▁█▁▅ 7.0 tok/sweep · 3.5 tok/s · 28 tokens · 8.0 s · context 58/200"


def test_the_first_sweep_reads_the_prompt_and_every_sweep_tells_its_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now, engine = 0.0, FakeEngine()
    monkeypatch.setattr("cli.terminal.meter.time.monotonic", lambda: now)
    monkeypatch.setenv("COLUMNS", "100")
    meter = SweepMeter(engine)
    places = iter([(0, 1, 0), (20, 1, 2_000_000), (40, 2, 4_000_000)])

    def progress() -> Progress:
        layer, sweeps, read = next(places)
        return Progress(layer, 80, sweeps, read)

    monkeypatch.setattr(engine, "progress", progress)
    assert meter.lines() == "  reading the prompt · sweep 1 ░░░░░░░░░░░░░░░░ layer 0/80"
    now = 1.0
    assert meter.lines() == "  reading the prompt · sweep 1 ████░░░░░░░░░░░░ layer 20/80 · 2.0 MB/s · 3.0 s left"
    meter.next_sweep(burst(3))
    meter.thinking = True
    now = 2.0
    first, _ = meter.lines().splitlines()
    assert re.fullmatch(r"  thinking… 3 tokens · sweep 2 ████████░{8} layer 40/80 · 2.0 MB/s · 0.0 s left", first)


def test_stopping_is_said_instead() -> None:
    meter = SweepMeter(FakeEngine())
    meter.stopping = True
    assert meter.lines() == "  stopping… (layer 2/5)"


def test_columns_are_comparable_and_the_last_ones_are_shown() -> None:
    assert sparkline([0, 1, 4, 8]) == "▁▁▄█"
    assert sparkline([32, 8, 16]) == "█▂▄"
    assert len(sparkline([3] * 100)) == 24
    assert (bar(0, 0), bar(5, 5)) == ("░" * 16, "█" * 16)


def test_a_narrow_terminal_shows_fewer_facts_and_none_of_them_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("cli.terminal.meter.time.monotonic", lambda: now)
    monkeypatch.setenv("COLUMNS", "40")
    meter = SweepMeter(FakeEngine(), lambda: 31)
    for _ in range(9):
        now += 2.0
        meter.next_sweep(burst(5))
    assert meter.lines().splitlines() == ["  sweep 10 layer 2/5 · 27.0 s left", "  ▅▅▅▅ 5.0 tok/sweep · 2.5 tok/s"]
