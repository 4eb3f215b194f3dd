"""bench and check, on the real demo pair: every row is there, plain decoding among them, and texts are compared."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.app import commands
from cli.bench.command import RULES
from cli.bench.prompts import bench_prompts
from cli.engine import learned_store as learned
from cli.shared.errors import MissingExtra
from cli.shared.options import EngineOptions
from offload.hub.names import demo_folder
from specexec import load
from specexec.engine.decoder import Decoder
from specexec.errors import BadText
from specexec.evaluation import audit as audit_module
from specexec.evaluation import rule_runner
from specexec.evaluation.audit import audit, first_difference
from specexec.sampling.params import SamplingParams

FAST = ["--limit", "2", "-q", "--dtype", "f32", "--offload", "none"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, [*arguments, *FAST], catch_exceptions=False)


def test_bench_always_has_the_plain_row_and_compares_texts() -> None:
    ran = run("bench", "--budgets", "4,auto", "--temperatures", "0,0.8", "-r", "1", "-n", "12", "-o", "json")
    rows = json.loads(ran.stdout)
    assert [(row["temperature"], row["budget"]) for row in rows] == [
        (heat, budget) for heat in (0.0, 0.8) for budget in ("0", "4", "auto")
    ]
    plain = [row for row in rows if row["budget"] == "0"]
    assert all(row["drafter"] == "none" and row["tokens_per_sweep"] == row["vs_plain"] == 1 for row in plain)
    assert all(row["same_texts"] == row["texts"] == 2 for row in rows)
    guessed = next(row for row in rows if row["budget"] == "4")
    assert guessed["tokens_per_sweep"] > 1
    before, after = guessed["calibration_error"]
    assert 0 <= after <= 1
    assert 0 <= before <= 1
    assert all(row["calibration_error"] is None for row in plain)
    assert guessed["accepted_by_depth"] == sorted(guessed["accepted_by_depth"], reverse=True)


def test_auto_chooses_by_what_bench_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "ENOUGH", 1)  # how many sweeps these texts take depends on the clock
    placed = ["--dtype", "f32", "--offload", "none"]

    def bench(*more: str) -> dict[str, float]:
        shown = run("bench", "-r", "1", "-n", "12", "-o", "json", *more)
        return {row["drafter"]: row["tokens_per_s"] for row in json.loads(shown.stdout) if row["budget"] == "auto"}

    def taken() -> str:
        told = CliRunner().invoke(commands, ["generate", "-p", "hello", "-n", "1", *placed]).stderr
        return told[told.index("(auto: ") :]

    bench("--budgets", "8", "--drafters", "sibling+ngram,ngram")
    assert taken().startswith("(auto: the paired model")  # another budget says nothing about it
    speeds = bench("--budgets", "auto", "--drafters", "sibling+ngram,ngram")
    assert len(speeds) == 2
    told = taken()
    assert "(auto: tokens/s here: " in told
    assert all(f"{speed:.3g}" in told for speed in speeds.values())
    options = EngineOptions().but(dtype="f32", offload="none")
    assert learned.measured(options).keys() == {
        "none",
        "ngram",
        "sibling+ngram",
    }


def test_bench_tells_what_overlap_hid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "_ahead_s", lambda *_: 60.0)  # however fast this machine is
    ran = run("bench", "--budgets", "4", "-r", "1", "-n", "12", "--drafter", "sibling", "-o", "json")
    plain, guessed = json.loads(ran.stdout)
    assert (plain["hidden"], 0 <= guessed["hit_rate"] <= 1, 0 <= guessed["hidden"] < 1) == (0, True, True)


@pytest.mark.parametrize("form", ["md", "csv", "jsonl"])
def test_bench_speaks_every_format(form: str) -> None:
    shown = run("bench", "--budgets", "4", "-r", "1", "-n", "6", "-o", form).stdout
    counts: dict[str, Callable[[], int]] = {
        "md": lambda: len(shown.splitlines()[2:]),
        "csv": lambda: len(list(csv.DictReader(io.StringIO(shown)))),
        "jsonl": lambda: len([json.loads(line) for line in shown.splitlines()]),
    }
    assert counts[form]() == 2


def test_bench_compares_rules_on_demand() -> None:
    shown = run("bench", "--budgets", "4", "--temperatures", "0,1", "-r", "1", "-n", "6", "-o", "json",
                "--rules", "walk,multi-step,block,typical")  # fmt: skip
    rows = json.loads(shown.stdout)
    rules = [row for row in rows if row["planner"].startswith("rule")]
    assert [row["planner"] for row in rules] == [
        *("rule: walk", "rule: multi-step", "rule: block", "rule: typical (LOSSY)"),
    ]
    assert all(row["temperature"] == 1.0 and row["tokens_per_sweep"] >= 1 for row in rules)
    assert 0 < rules[1]["of_bound"] <= 1.5
    assert {row["drafter"] for row in rules} == {"demo drafter"}, "what is joined to it takes no part"
    assert list(rule_runner.NAMES) == RULES


def test_rules_that_cannot_be_compared_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cli.bench.command.measure", None)
    ran = run("bench", "--rules", "walk")
    assert ran.exit_code == 2
    assert "a temperature above 0" in ran.output
    with pytest.raises(BadText, match="a model that drafts"):
        run("bench", "--rules", "walk", "--temperatures", "1", "--drafters", "ngram")
    shutil.copytree(demo_folder("drafter"), tmp_path / "other")
    with pytest.raises(BadText, match="one model that drafts, here 2 do"):
        run("bench", "--rules", "walk", "--temperatures", "1", "--drafters", f"sibling+{tmp_path / 'other'}")


def test_bench_draws_what_it_measured(tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    shown = run("bench", "--budgets", "4,16", "-r", "1", "-n", "6", "-o", "json", "--plot", str(picture))
    rows = json.loads(shown.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert all(row["memory_B"] > 10**8 for row in rows)
    assert all(row["compute_s"] > 0 == row["stream_s"] for row in rows), "nothing streams, nothing waits"


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.bench.plot.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="matplotlib"):
        run("bench", "--plot", "nowhere.png")


def test_bench_does_not_measure_that_its_rounds_repeat(tmp_path: Path) -> None:
    """Retrieval would know every answer from the round before; nor may anything be left for the next command."""
    file = tmp_path / "prompts.txt"
    file.write_text("What is a tree?\n")
    asked = ("bench", "--budgets", "32", "-n", "24", "--drafters", "ngram", "--prompts", str(file), "-o", "json")
    once, more = (json.loads(run(*asked, "-r", str(rounds)).stdout)[1] for rounds in (1, 3))
    assert more["tokens_per_sweep"] <= 1.5 * once["tokens_per_sweep"]
    kept = [path.name for path in Path(os.environ["XDG_STATE_HOME"]).rglob("*.safetensors")]
    assert all(name.startswith("speeds-") for name in kept), "nothing that a drafter or a budget would begin with"


def test_a_wrong_item_of_a_list_is_a_wrong_option() -> None:
    ran = run("bench", "--offloads", "ram,bogus")
    assert ran.exit_code == 2
    assert "'bogus' is not one of" in ran.output


def test_check_finds_the_demo_exact(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("What is a tree?\n\nTell me something else.\n")
    ran = run("check", "--prompts", str(file), "-t", "0.9", "-n", "16", "--json")
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["What is a tree?", "Tell me something else."]
    assert all(row["first"] is None for row in rows)
    assert ran.exit_code == 0


def test_a_difference_is_found_and_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that errs in its third token: the margin is the true distance of the two tokens' scores."""
    sampling = SamplingParams(temperature=0.0, max_tokens=6)
    with load("demo", offload="none", dtype="f32") as llm:
        honest = llm.generate("The import statement", sampling)
        answers = iter([honest, honest])
        wrong = list(honest.tokens)
        wrong[2] += 1
        first = next(answers)
        object.__setattr__(first, "tokens", tuple(wrong))
        right = llm.generate("The import statement", sampling)
        both = iter([first, right])
        monkeypatch.setattr(llm, "generate", lambda *_: next(both))
        found = audit(llm, "The import statement", sampling)
        assert found.first == 2
        scores = llm.scores("The import statement", right.tokens[:2], sampling)
        assert int(scores.argmax()) == right.tokens[2]
        assert found.margin == pytest.approx(float(scores[right.tokens[2]] - scores[wrong[2]]))


def test_where_texts_part() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert audit_module.Audit(3, 1, None, None).identical


def test_a_line_of_prompts_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "one\u2028two\x85"}\r\n\n{"prompt": "three"}\n', newline="")
    assert [row.text for row in bench_prompts(file)] == ["one\u2028two\x85", "three"]
