"""`specexec generate`: every prompt gets a record, a bad one an error record, and nothing finished is ever lost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.engine.revision import fingerprint
from offload.hub.names import demo_folder
from specexec.errors import SpecexecError
from specexec.sampling.params import SamplingParams, derived_seed
from specexec.stats import Burst
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys, monkeypatch, FakeEngine())


def records(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_prompts_are_answered_on_stdout_in_order(specexec: CommandLine) -> None:
    Path("a.txt").write_text("from a file\n")
    ran = specexec("generate", "-p", "one", "a.txt", "-", stdin="from a pipe\n")
    assert (ran.code, ran.out) == (0, "echo: from a file\n".join(["echo: one\n", "echo: from a pipe\n"]))
    assert re.search(r"^3 answered · 43 tokens · [\d.]+ tok/s · \d\.\d tok/sweep · seed \d+$", ran.err, re.M)


def test_a_record_holds_the_answer_and_its_cost(specexec: CommandLine) -> None:
    ran = specexec("generate", "-p", "héllo", "-o", "out.jsonl", "--seed", "7")
    assert (ran.code, ran.out) == (0, "")
    written = records("out.jsonl")
    assert written == [
        {
            "id": "prompt:1",
            "index": 0,
            "prompt_sha": written[0]["prompt_sha"],
            "text": "echo: héllo",
            "reasoning": None,
            "tool_calls": None,
            "finish_reason": "stop",
            "limit": None,
            "usage": {"prompt_tokens": 5, "completion_tokens": 11},
            "seed": str(derived_seed(7, "prompt:1")),
            "sweeps": 5,
            "tokens_per_sweep": 2.2,
            "bytes_read": 0,
            "seconds": 0.25,
            "token_ids": [ord(letter) for letter in "echo: héllo"],
            "model": f"demo@{fingerprint(demo_folder('target'))}",
            "error": None,
        }
    ]


def test_json_goes_to_stdout_too(specexec: CommandLine) -> None:
    ran = specexec("-q", "generate", "--json", "-p", "one", "-p", "two")
    assert [json.loads(line)["text"] for line in ran.out.splitlines()] == ["echo: one", "echo: two"]
    assert ran.err == ""


def test_the_seed_belongs_to_the_item_not_to_its_place(specexec: CommandLine) -> None:
    lines = [json.dumps({"id": name, "prompt": name}) for name in ("a", "b", "c")]
    Path("abc.jsonl").write_text("\n".join(lines))
    Path("ca.jsonl").write_text("\n".join([lines[2], lines[0]]))
    specexec("generate", "abc.jsonl", "-o", "1.jsonl", "--seed", "7")
    specexec("generate", "ca.jsonl", "-o", "2.jsonl", "--seed", "7")
    first = {record["id"]: record["seed"] for record in records("1.jsonl")}
    second = {record["id"]: record["seed"] for record in records("2.jsonl")}
    assert first["a"] == second["a"]
    assert len(set(first.values())) == 3


def test_a_bad_line_costs_itself_and_nothing_else(specexec: CommandLine) -> None:
    Path("in.jsonl").write_bytes(
        b'{"prompt": "one"}\n{"prompt": "He said "no"}\n\n{"question": "what"}\n[1]\n{"prompt": ""}\n{"prompt": 5}\n'
        b'{"prompt": "\xff"}\n{"id": 9, "text": "last"}\n'
    )
    ran = specexec("generate", "in.jsonl", "-o", "out.jsonl")
    assert ran.code == 8
    written = records("out.jsonl")
    assert [(record["id"], record["text"]) for record in written if record["error"] is None] == [
        ("in.jsonl:1", "echo: one"),
        ("9", "echo: last"),
    ]
    errors = [record["error"] for record in written if record["error"]]
    assert errors == [
        {"code": code, "message": message, "hint": hint}
        for code, message, hint in [
            ("bad_jsonl", "in.jsonl:2: not JSON (Expecting ',' delimiter, column 22).", None),
            ("bad_jsonl", "in.jsonl:4: no field 'prompt' or 'messages' or 'text'.", "name it with --field."),
            ("bad_jsonl", "in.jsonl:5: a line must be an object, this is a list.", None),
            ("empty_prompt", "in.jsonl:6: field 'prompt': the prompt is empty.", None),
            ("bad_jsonl", "in.jsonl:7: field 'prompt': neither text nor messages with role and content.", None),
            ("bad_jsonl", "in.jsonl:8: not UTF-8 text.", None),
        ]
    ]  # fmt: skip
    assert set(written[0]) == set(written[1])
    assert "in.jsonl:2: not JSON (Expecting ',' delimiter, column 22).\n" in ran.err
    assert "2 answered · 6 failed" in ran.err


def test_a_prompt_beyond_the_context_is_an_error_record_too(specexec: CommandLine) -> None:
    ran = specexec("generate", "-p", "x" * 201, "-p", "one", "-o", "out.jsonl")
    assert ran.code == 8
    assert [record["text"] for record in records("out.jsonl")] == [None, "echo: one"]


def test_strict_stops_at_the_first_bad_line_before_loading(specexec: CommandLine) -> None:
    Path("in.jsonl").write_text('{"prompt": "one"}\nnonsense\n')
    ran = specexec("generate", "in.jsonl", "--strict")
    assert (ran.code, ran.err) == (7, "Error: in.jsonl:2: not JSON (Expecting value, column 1).\n")
    assert specexec.options is None


def test_messages_and_other_fields(specexec: CommandLine) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    Path("in.jsonl").write_text(json.dumps({"messages": messages, "question": "what"}))
    assert specexec("generate", "-q", "in.jsonl").out == "echo: hi\n"
    assert specexec("generate", "-q", "in.jsonl", "--field", "question").out == "echo: what\n"
    assert [prompt for prompt, _ in specexec.engine.asked] == [messages, [{"role": "user", "content": "what"}]]
    ran = specexec("generate", "-q", "in.jsonl", "--raw")
    assert (ran.code, ran.err) == (8, "in.jsonl:1: field 'messages': messages need the chat template.\n")


def test_raw_leaves_the_prompt_as_it_is(specexec: CommandLine) -> None:
    specexec("generate", "--raw", "-p", "Once upon")
    assert [prompt for prompt, _ in specexec.engine.asked] == ["Once upon"]


def test_an_existing_output_is_refused_before_loading(specexec: CommandLine) -> None:
    Path("out.jsonl").write_text("{}\n{}\n")
    ran = specexec("generate", "-p", "x", "-o", "out.jsonl")
    assert ran.code == 9
    assert ran.err.startswith("Error: out.jsonl already exists (2 lines).\n  Try: --resume to continue it, ")
    assert specexec.options is None
    assert specexec("generate", "-p", "x", "-o", "out.jsonl", "--overwrite").code == 0
    assert len(records("out.jsonl")) == 1


def test_the_input_is_never_overwritten(specexec: CommandLine) -> None:
    Path("in.jsonl").write_text('{"prompt": "one"}\n')
    ran = specexec("generate", "in.jsonl", "-o", "./in.jsonl", "--overwrite")
    assert ran.code == 2
    assert len(records("in.jsonl")) == 1


def test_nothing_to_answer_is_wrong_usage(specexec: CommandLine) -> None:
    assert specexec("generate").code == 2
    assert specexec("generate", "missing.txt").code == 2


class ReadFailed(SpecexecError):
    code = "read_failed"


def test_an_error_of_the_engine_stops_the_run_and_keeps_what_is_done(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = specexec.engine.stream

    def failing(prompt: object, sampling: SamplingParams) -> Iterator[Burst]:
        if "two" in str(prompt):
            raise ReadFailed("layer 3 of model.safetensors could not be read.")
        return stream(prompt, sampling)  # type: ignore[arg-type]

    monkeypatch.setattr(specexec.engine, "stream", failing)
    ran = specexec("generate", "-p", "one", "-p", "two", "-p", "three", "-o", "out.jsonl", "--parallel", "1")
    assert ran.code == 4
    assert [record["text"] for record in records("out.jsonl")] == ["echo: one"]


@pytest.mark.parametrize(
    ("toy", "budget", "command", "sampled"),
    [
        (False, 64, ("generate", "-p", "hello"), True),
        (False, 64, ("check", "-n", "4"), False),
        (False, 0, ("generate", "-p", "hello"), False),
        (True, 64, ("generate", "-p", "hello"), False),
    ],
)
def test_only_where_a_loss_would_be_reported_sweeps_are_plain(
    toy: bool, budget: int, command: tuple[str, ...], sampled: bool, specexec: CommandLine
) -> None:
    specexec.engine.toy, specexec.engine.budget = toy, budget
    specexec(*command)
    assert specexec.engine.accounting.samples_plain == sampled
