"""A run from outside: signals end it with everything saved, its ETA is a range, and many items leave nothing behind."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

import specexec
from cli.app import main
from cli.batch.eta import TimeLeft, spelled
from specexec.sampling.params import SamplingParams
from tests.held import added_by_every


def essence(path: Path) -> list[tuple[object, ...]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((one["id"], one["text"], one["finish_reason"], one["token_ids"]) for one in records)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_everything_saved(
    number: signal.Signals, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    items = [{"id": f"i{at}", "prompt": "Once upon a time", "max_tokens": at * 12 + 1} for at in range(4)]
    source, output, undisturbed = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    run = ["generate", str(source), "--seed", "1", "-t", "0.8", "--dtype", "f32", "--ignore-eos", "--budget", "4"]
    assert main([*run, "-o", str(undisturbed)]) == 0

    def interrupt() -> None:
        while not output.exists() or not output.stat().st_size:  # until the first answer is there
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    slowly = ["--offload", "disk", "--link-limit", "4MB/s"]  # a sweep takes a second: nothing ends before the signal
    assert main([*run, "-o", str(output), *slowly]) == code
    sender.join()
    assert "Nothing is lost. Continue with the same command and --resume." in capfd.readouterr().err
    assert 0 < len(essence(output)) < len(items)
    assert json.loads(Path(f"{output}.partial.json").read_text())["items"], "what was begun is kept"
    assert main([*run, "-o", str(output), "--resume"]) == 0
    assert essence(output) == essence(undisturbed)


def test_the_eta_is_a_range_that_holds_nine_times_in_ten() -> None:
    chance, within = random.Random(7), 0
    for _ in range(200):
        forecast = TimeLeft(longest=512)
        lengths = [min(int(chance.expovariate(1 / 120)) + 1, 512) for _ in range(60)]
        for length in lengths[:20]:
            forecast.learn(length)
        left = forecast.left_s(40, 0, tokens_per_s=10.0)
        assert left is not None
        low, high = left
        assert 0 <= low < high
        within += low <= sum(lengths[20:]) / 10.0 <= high
    assert within >= 180


def test_the_eta_knows_nothing_before_the_first_answer_and_narrows_with_every_one() -> None:
    forecast = TimeLeft(longest=512)
    assert forecast.left_s(10, 0, 5.0) is None
    widths = []
    for length in [100, 140] * 8:
        forecast.learn(length)
        low, high = forecast.left_s(1000, 0, 5.0) or (0.0, 0.0)
        widths.append(high - low)
    assert widths[-1] < widths[1]
    assert forecast.left_s(1, 10_000, 5.0) == (0.0, 0.0), "more is written than was expected"


def test_answers_of_one_length_leave_the_speed_in_doubt() -> None:
    forecast = TimeLeft(longest=512)
    for _ in range(8):
        forecast.learn(9)
    low, high = forecast.left_s(36, 0, tokens_per_s=10.0) or (0.0, 0.0)
    assert low < 0.95 * high
    assert spelled((low, high)) == "29–36 s"


@pytest.mark.parametrize(
    ("left", "says"),
    [((20.2, 40.4), "20–41 s"), ((3.2, 3.3), "3–4 s"), ((150, 330), "2–6 min"), ((4200, 6000), "1 h 10–1 h 40")],
)
def test_an_eta_is_spelled_for_people(left: tuple[float, float], says: str) -> None:
    assert spelled(left) == says


def test_items_leave_no_files_no_threads_and_no_memory() -> None:
    """The quick version of scripts/soak_batch.py."""
    sampling = SamplingParams(max_tokens=4, seed=1)
    with specexec.load("demo", offload="disk", dtype="f32", budget=4) as llm:

        def answer() -> None:
            prompts = [f"Question {number}" for number in range(32)]
            assert len(list(llm.generate_many(prompts, sampling, parallel=16))) == 32

        added = added_by_every(answer)
        assert max(added.files, added.threads) <= 0
        assert added.tensors < 8, "and not one for every item"
        assert added.memory_B < 8 << 20
