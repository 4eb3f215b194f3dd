"""`specexec generate` over many runs: whatever ended one, the next goes on, and mixes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.shared.errors import EXIT_CODES
from offload.errors import ReadFailed
from offload.hub.names import demo_folder
from offload.machine.files import SAFE
from offload.machine.speeds import Disk, Speeds, disk_key, save_speeds
from specexec.sampling.params import SamplingParams, derived_seed
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


def test_a_resumed_run_says_what_was_begun_though_nothing_was_finished(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(specexec, monkeypatch, "a rather", burst=6)
    assert specexec(*RUN).code == 4
    Path("out.jsonl").write_bytes(Path("out.jsonl").read_bytes()[:-9])  # as a power cut would leave its only line
    ran = specexec(*RUN, "--resume")
    assert (ran.code, "out.jsonl: 0 finished, 2 in part, 5 to do\n" in ran.err) == (0, True)


def test_a_resumed_run_takes_the_seed_of_the_first(specexec: CommandLine) -> None:
    specexec(*RUN, "--limit", "2")
    specexec(*RUN, "--resume")
    run_seed = json.loads(Path("out.jsonl.manifest.json").read_text())["configuration"]["--seed"]
    seeds = [str(derived_seed(run_seed, name)) for name in records()]
    assert [record["seed"] for record in records().values()] == seeds  # as text: JavaScript would round the numbers
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


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--template", "{{ text"], 2, "line 1 of the template: unexpected end of template, expected"),
        (["--template", "x\n{{ a b }}"], 2, "line 2 of the template: expected token 'end of print statement'"),
        (["-o", "/dev/null"], 9, "Error: /dev/null is not a file that results could be added to.\n"),
    ],
)
def test_what_no_item_could_do_is_refused_before_loading(
    specexec: CommandLine, arguments: list[str], code: int, says: str
) -> None:
    ran = specexec("generate", "in.txt", *arguments)
    assert (ran.code, says in ran.err, specexec.options) == (code, True, None)


def test_what_is_no_model_folder_is_named_before_anything_is_written(specexec: CommandLine) -> None:
    Path("model.gguf").write_bytes(b"GGUF" + bytes(20))
    for more in (("-o", "out.jsonl"), ("--dry-run",), ("--on-too-long", "skip")):
        ran = specexec("generate", "in.txt", "-m", "model.gguf", *more)
        assert ran.code == EXIT_CODES["unsupported_arch"]
        assert "model.gguf is version 0" in ran.err
    assert not Path("out.jsonl").exists()


def test_a_folder_beside_the_weights_is_no_file_of_the_model(specexec: CommandLine, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_folder("drafter"), model)
    (model / "notes.txt").mkdir()
    assert specexec("generate", "in.txt", "-m", str(model), "-o", "out.jsonl").code == 0


def test_an_input_without_prompts_is_reported(specexec: CommandLine) -> None:
    Path("empty").mkdir()
    ran = specexec("generate", "empty", "-o", "out.jsonl")
    assert (ran.code, ran.out, ran.err) == (0, "", "no prompts were found\n")


def test_reading_long_prompts_brings_no_alarm_of_other_libraries(tmp_path: Path) -> None:
    """The tokenizer warns of errors that an answer would end in; here it is only counting."""
    (tmp_path / "long.txt").write_text("word " * 5000)
    script = "import sys; from cli.app import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", script, "generate", str(tmp_path / "long.txt"), "--on-too-long", "skip"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "prompts longer than the context: 1 left out\n")


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
    Path("in.txt").write_text("one\n" + "y" * 250 + "\ntwo")
    ran = specexec(*RUN, "--resume")
    assert (ran.code, "Try: --retry-failed, since all of them had failed." in ran.err) == (9, True)
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
    found = {record["custom_id"]: record for record in records().values()}
    body = found["r2"]["response"]["body"]  # type: ignore[index]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "echo: ques", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "length"
    details = body["usage"].pop("completion_tokens_details")
    assert sum(details.values()) == 10, "the guesses of FakeEngine, right and wrong"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
    assert set(found) == {"r1", "r2", "r3", "in.jsonl:4"}
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


@pytest.mark.parametrize("where", [("-o", "notes/out.jsonl"), ("--output-dir", "notes/answers")])
def test_results_among_their_prompts_are_not_asked_when_the_run_is_resumed(
    specexec: CommandLine, where: tuple[str, str]
) -> None:
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("one")
    Path("notes/b.txt").write_text("two")
    assert specexec("generate", "notes", *where, "--limit", "1").code == 0
    assert specexec("generate", "notes", *where, "--resume").code == 0
    assert set(records(where[1] if where[0] == "-o" else "notes/answers/records.jsonl")) == {
        "notes/a.txt",
        "notes/b.txt",
    }
    specexec.engine.asked.clear()
    assert specexec("generate", "notes", "-q").code == 0
    assert len(specexec.engine.asked) == 2


def test_texts_replace_no_input_and_nothing_that_was_there(specexec: CommandLine) -> None:
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    for inputs, folder in (("notes/a.txt", "."), ("notes", "."), ("notes", "notes"), (".", ".")):
        ran = specexec("generate", inputs, "--output-dir", folder)
        assert (ran.code, "name a folder of its own" in ran.err) == (2, True)
    Path("texts/notes").mkdir(parents=True)
    Path("texts/notes/a.txt").write_text("kept")
    ran = specexec("generate", "notes", "--output-dir", "texts")
    assert (ran.code, "texts/notes/a.txt already exists" in ran.err) == (9, True)
    assert (Path("notes/a.txt").read_text(), Path("texts/notes/a.txt").read_text()) == ("mine", "kept")
    assert not Path("texts/records.jsonl").exists()
    assert specexec("generate", "notes", "--output-dir", "texts", "--overwrite").code == 0
    assert Path("texts/notes/a.txt").read_text() == "echo: mine\n"


def test_files_of_a_resumed_run_are_called_as_in_one_run_and_replace_none(specexec: CommandLine) -> None:
    def texts(folder: str) -> dict[str, str]:
        return {file.name: file.read_text() for file in Path(folder).glob("*.txt")}

    lines = [json.dumps({"id": name, "prompt": name}) + "\n" for name in "?!"]  # no file is called so
    for folder in ("whole", "parts"):
        for part in ("".join(lines),) if folder == "whole" else ("\n" + lines[1], "".join(lines)):
            Path("in.jsonl").write_text(part)
            assert specexec("generate", "in.jsonl", "--output-dir", folder, "--resume").code == 0
    assert sorted(texts("whole").values()) == sorted(texts("parts").values()) == ["echo: !\n", "echo: ?\n"]


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
    assert report["answer_tokens"] == 2 * 512
    low, high = report["seconds"]
    assert 0 < low < high


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        (["-d", "none"], [1, 1]),
        (["-d", "ngram"], [1, 3]),
        ([], [5, 10]),
        (["-b", "4"], [5, 5]),
        (["-d", "skip"], [5, 10]),
    ],
)
def test_a_dry_run_promises_no_more_tokens_a_sweep_than_plan(
    specexec: CommandLine, asked: list[str], tokens: list[int]
) -> None:
    dry = [*RUN, "--dry-run", *asked]
    report = json.loads(specexec(*dry, "--json").out)
    assert report["tokens_per_sweep"] == tokens
    low, high = tokens
    assert report["seconds"][1] == pytest.approx(report["seconds"][0] * high / low)
    words = f"{low} to {high} tokens" if high > low else f"{low} token{'s' * (low > 1)}"
    assert f"at a time, {words} a sweep each" in specexec(*dry).out
    if "skip" not in asked:
        planned = json.loads(specexec("plan", "demo", "--gpu", "none", "--json", *asked).out)
        assert planned["tokens_per_sweep"] == tokens


def test_the_estimate_of_a_dry_run_follows_the_wire_and_the_answers(specexec: CommandLine) -> None:
    def seconds(*more: str) -> list[float]:
        report = json.loads(specexec("generate", "in.jsonl", "--dry-run", "--json", *more).out)
        return [float(one) for one in report["seconds"]]

    Path("in.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "max_tokens": 4}\n')
    assert seconds("-n", "4", "--link-limit", "4MB/s") == [
        pytest.approx(2 * one) for one in seconds("-n", "4", "--link-limit", "8MB/s")
    ]
    assert seconds("-n", "12", "--link-limit", "4MB/s") == [
        pytest.approx(2 * one) for one in seconds("-n", "4", "--link-limit", "4MB/s")
    ]
    assumed = specexec("generate", "in.jsonl", "--dry-run").out
    save_speeds(Speeds(disks={disk_key(demo_folder("target")): Disk(1.5e9, SAFE)}))
    measured = specexec("generate", "in.jsonl", "--dry-run").out
    assert ("at 3.0 GB/s, assumed" in assumed, "at 1.5 GB/s, measured" in measured) == (True, True)


def test_one_bad_line_in_a_hundred_costs_ten_records_of_a_thousand(specexec: CommandLine) -> None:
    lines = ['{"prompt": "x"}' if number % 100 else '{"prompt": ' for number in range(1000)]
    Path("in.jsonl").write_text("\n".join(lines))
    ran = specexec("-q", "generate", "in.jsonl", "-o", "out.jsonl", "-n", "1", "--parallel", "50")
    assert ran.code == 8
    errors = [record for record in records().values() if record["error"]]
    assert (len(records()), len(errors)) == (1000, 10)


def test_the_same_question_is_answered_once_and_recorded_for_everybody(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in.txt").write_text("one\ntwo, which is long\none\n" + "x" * 250 + "\none\n" + "x" * 250)
    run = (*RUN, "--seed", "5", "--dedupe")
    assert specexec(*run).code == 8
    assert [prompt[0]["content"] for prompt, _ in specexec.engine.asked] == ["one", "two, which is long", "x" * 250]  # type: ignore[index]
    whole, found = essence(), records()
    assert {name: record["duplicate_of"] for name, record in found.items()} == {
        "in.txt:1": None, "in.txt:2": None, "in.txt:3": "in.txt:1", "in.txt:4": None, "in.txt:5": "in.txt:1",
        "in.txt:6": "in.txt:4",
    }  # fmt: skip
    assert {found[name]["text"] for name in ("in.txt:1", "in.txt:3", "in.txt:5")} == {"echo: one"}
    assert len({found[name]["seed"] for name in ("in.txt:1", "in.txt:3", "in.txt:5")}) == 1
    assert [found[name]["sweeps"] for name in ("in.txt:1", "in.txt:3", "in.txt:5")] == [5, 0, 0]
    # A crash between an answer and its copies: what is computed again is the same.
    lines = Path("out.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").write_text(
        "".join(line for line in lines if '"in.txt:3"' not in line and '"in.txt:5"' not in line)
    )
    assert specexec(*run, "--resume").code == 8
    assert essence() == whole
    assert specexec(*RUN, "--seed", "5", "--resume").code == 9, "without it other seeds would belong to the copies"


def test_prompts_that_are_too_long_can_be_cut_or_left_out(specexec: CommandLine) -> None:
    Path("in.txt").write_text("short\n" + "a word " * 40 + "and this is the end.")
    specexec.engine.context = 64
    run = (*RUN, "--ctx", "64", "-n", "16")
    assert specexec(*run).code == 8
    assert specexec(*run, "--resume", "--on-too-long", "left").code == 9
    ran = specexec(*run, "--overwrite", "--on-too-long", "skip")
    assert (ran.code, set(records())) == (0, {"in.txt:1"})
    assert "prompts longer than the context: 1 left out\n" in ran.err
    ran = specexec(*run, "--overwrite", "--on-too-long", "left", "--dry-run")
    assert (ran.code, "2 items, 0 bad, 0 too long" in ran.out) == (0, True)
    specexec.engine.asked.clear()
    specexec(*run, "--overwrite", "--on-too-long", "left")
    asked = [str(prompt[0]["content"]) for prompt, _ in specexec.engine.asked]  # type: ignore[index]
    assert asked[0] == "short"
    assert asked[1].endswith("and this is the end.")
    assert len(asked[1]) < 280


@pytest.mark.parametrize(
    "contradiction",
    [("-o", "x", "--output-dir", "y"), ("--resume",), ("-o", "x", "--resume", "--overwrite"), ("--shard", "3/2"),
     ("--system", "s", "--raw"), ("-o", "x", "--output-format", "text"), ("--parallel", "0")],
)  # fmt: skip
def test_what_contradicts_itself_is_wrong_usage(specexec: CommandLine, contradiction: tuple[str, ...]) -> None:
    assert specexec("generate", "-p", "x", *contradiction).code == 2
