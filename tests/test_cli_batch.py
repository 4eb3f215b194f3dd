"""`specexec generate` over many runs: whatever ended one, the next goes on, and mixes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.errors import ReadFailed
from specexec.sampling import SamplingParams, derived_seed
from specexec.stats import Burst
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine

ITEMS = ["one", "a rather long prompt", "two", "another long prompt", "three"]
RUN = ("generate", "in.txt", "--split", "lines", "-o", "out.jsonl", "-t", "0.7", "--parallel", "2")


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("\n".join(ITEMS))
    return CommandLine(capsys, monkeypatch, FakeEngine())


def records(path: str = "out.jsonl") -> dict[str, dict[str, object]]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found = {str(json.loads(line)["id"]): json.loads(line) for line in lines}
    assert len(found) == len(lines)
    return found


def essence(path: str = "out.jsonl") -> dict[str, tuple[object, ...]]:
    keys = ("index", "prompt_sha", "text", "finish_reason", "seed", "token_ids", "error")
    return {name: tuple(record[key] for key in keys) for name, record in records(path).items()}


def break_at(specexec: CommandLine, monkeypatch: pytest.MonkeyPatch, prompt: str, burst: int) -> None:
    """The disk fails at one burst of one answer, once."""
    stream = FakeEngine.stream

    def failing(self: FakeEngine, asked: object, sampling: SamplingParams, *more: tuple[int, ...]) -> Iterator[Burst]:
        for number, one in enumerate(stream(self, asked, sampling, *more)):  # type: ignore[arg-type]
            if prompt in str(asked) and number == burst:
                monkeypatch.setattr(FakeEngine, "stream", stream)
                raise ReadFailed("layer 3 of model.safetensors could not be read.")
            yield one

    monkeypatch.setattr(FakeEngine, "stream", failing)


def test_a_resumed_run_does_what_is_left_and_goes_on_in_mid_answer(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    specexec(*RUN, "--seed", "5")
    undisturbed = essence()
    Path("out.jsonl").unlink()
    break_at(specexec, monkeypatch, "a rather", burst=6)
    assert specexec(*RUN, "--seed", "5").code == 4
    assert set(records()) == {"in.txt:1"}
    begun = json.loads(Path("out.jsonl.partial.json").read_text())["items"]
    assert set(begun) == {"in.txt:2", "in.txt:3"}
    specexec.engine.asked.clear()
    ran = specexec(*RUN, "--seed", "5", "--resume")
    assert ran.code == 0
    assert "out.jsonl: 1 finished, 2 in part, 4 to do\n" in ran.err
    assert "5 answered · " in ran.err
    assert essence() == undisturbed
    assert len(specexec.engine.asked) == 4
    assert not Path("out.jsonl.partial.json").exists()


def test_a_resumed_run_takes_the_seed_of_the_first(specexec: CommandLine) -> None:
    specexec(*RUN, "--limit", "2")
    specexec(*RUN, "--resume")
    run_seed = json.loads(Path("out.jsonl.manifest.json").read_text())["configuration"]["--seed"]
    assert [record["seed"] for record in records().values()] == [
        derived_seed(run_seed, name) for name in records()
    ]  # fmt: skip
    assert len(records()) == 5


def test_another_configuration_is_refused_before_loading(specexec: CommandLine) -> None:
    specexec(*RUN, "--limit", "1")
    specexec.options = None
    ran = specexec(*RUN, "--resume", "-t", "0.2", "--system", "Be brief.")
    assert ran.code == 9
    assert ran.err.startswith("Error: out.jsonl was made with ")
    assert "--temperature" in ran.err
    assert "--system" in ran.err
    assert specexec.options is None


def test_what_cannot_change_a_text_may_change(specexec: CommandLine) -> None:
    specexec(*RUN, "--limit", "2")
    ran = specexec(*RUN, "--resume", "--budget", "7", "--drafter", "none", "--parallel", "4", "--offload", "ram")
    assert (ran.code, len(records())) == (0, 5)


def test_a_finished_run_is_not_begun_again(specexec: CommandLine) -> None:
    specexec(*RUN)
    before = Path("out.jsonl").read_bytes()
    specexec.options = None
    assert specexec(*RUN, "--resume").code == 0
    assert specexec.options is None
    assert Path("out.jsonl").read_bytes() == before


def test_failed_items_stay_failed_until_they_are_tried_again(specexec: CommandLine) -> None:
    Path("in.txt").write_text("one\n" + "x" * 250 + "\ntwo")
    assert specexec(*RUN).code == 8
    assert records()["in.txt:2"]["error"]
    ran = specexec(*RUN, "--resume")
    assert ran.code == 8, "the run is finished, but not all of it is answered"
    specexec.engine.context = 300
    ran = specexec(*RUN, "--retry-failed")
    assert ran.code == 0
    assert {name: record["error"] for name, record in records().items()} == dict.fromkeys(
        ("in.txt:1", "in.txt:2", "in.txt:3")
    )


def test_openais_batch_lines_in_and_out_can_be_resumed(specexec: CommandLine) -> None:
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": [{"role": "user", "content": f"question {n}"}], "max_tokens": 5 * n}}
        for n in range(1, 4)
    ]  # fmt: skip
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "nonsense\n")
    arguments = ("generate", "in.jsonl", "-o", "out.jsonl", "--output-format", "openai-batch", "--seed", "1")
    assert specexec(*arguments, "--limit", "2").code == 0
    ran = specexec(*arguments, "--resume")
    assert ran.code == 8
    assert "out.jsonl: 2 finished, 0 in part, 2 to do\n" in ran.err
    found = records()
    body = found["r2"]["response"]["body"]  # type: ignore[index]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "echo: ques"}
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
    assert {record["custom_id"] for record in found.values()} == {"r1", "r2", "r3", "in.jsonl:4"}
    assert found["in.jsonl:4"]["response"] is None
    assert found["in.jsonl:4"]["error"]["code"] == "bad_jsonl"  # type: ignore[index]


def test_one_file_for_each_input(specexec: CommandLine) -> None:
    for name in ("texts/a.txt", "texts/deep/b.md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"from {name}")
    assert specexec("generate", "texts", "--output-dir", "answers").code == 0
    assert Path("answers/texts/a.txt").read_text() == "echo: from texts/a.txt\n"
    assert Path("answers/texts/deep/b.md").read_text() == "echo: from texts/deep/b.md\n"
    assert set(records("answers/records.jsonl")) == {"texts/a.txt", "texts/deep/b.md"}
    assert specexec("generate", "texts", "--output-dir", "answers").code == 9


def test_shards_together_are_the_whole(specexec: CommandLine) -> None:
    specexec(*RUN, "--seed", "3")
    whole = essence()
    parts: dict[str, tuple[object, ...]] = {}
    for part in (1, 2, 3):
        run = [word.replace("out.jsonl", f"part{part}.jsonl") for word in RUN]
        specexec(*run, "--seed", "3", "--shard", f"{part}/3")
        parts |= essence(f"part{part}.jsonl")
    assert parts == whole


def test_a_dry_run_loads_and_writes_nothing(specexec: CommandLine) -> None:
    Path("in.txt").write_text("short\n" + "word " * 3000 + "\n\nlast")
    ran = specexec(*RUN, "--dry-run")
    assert ran.code == 8, "one prompt is too long"
    assert ran.out.startswith("3 items, 0 bad, 1 too long\n")
    assert "in.txt:2" in ran.out
    assert "assumed" in ran.out
    assert specexec.options is None
    assert not Path("out.jsonl").exists()
    report = json.loads(specexec(*RUN, "--dry-run", "--json").out)
    assert (report["items"], report["too_long"]) == (3, ["in.txt:2"])


def test_one_bad_line_in_a_hundred_costs_ten_records_of_a_thousand(specexec: CommandLine) -> None:
    lines = ['{"prompt": "x"}' if number % 100 else '{"prompt": ' for number in range(1000)]
    Path("in.jsonl").write_text("\n".join(lines))
    ran = specexec("-q", "generate", "in.jsonl", "-o", "out.jsonl", "-n", "1", "--parallel", "50")
    assert ran.code == 8
    errors = [record for record in records().values() if record["error"]]
    assert (len(records()), len(errors)) == (1000, 10)


@pytest.mark.parametrize(
    "contradiction",
    [("-o", "x", "--output-dir", "y"), ("--resume",), ("-o", "x", "--resume", "--overwrite"), ("--shard", "3/2"),
     ("--system", "s", "--raw"), ("-o", "x", "--output-format", "text"), ("--parallel", "0")],
)  # fmt: skip
def test_what_contradicts_itself_is_wrong_usage(specexec: CommandLine, contradiction: tuple[str, ...]) -> None:
    assert specexec("generate", "-p", "x", *contradiction).code == 2
