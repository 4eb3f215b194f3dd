"""Lines as people have them: one that cannot be answered is a record that says why, and ends nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.batch.input.form import Form
from cli.batch.input.inputs import read_inputs
from cli.batch.input.items import Item
from cli.batch.input.lines import item_of_line
from cli.shared.quantities import in_json
from specexec.sampling.params import SamplingParams
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
ASKED = {"role": "user", "content": "w"}
CALL = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "ok"}


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys, monkeypatch, FakeEngine())


def read(line: object, form: Form = Form(), place: str = "f:1") -> Item:  # noqa: B008  (frozen)
    return item_of_line(line if isinstance(line, bytes) else json.dumps(line).encode(), place, form)


def refused(line: object, form: Form = Form()) -> str:  # noqa: B008  (frozen)
    """What is said of a line that cannot be answered."""
    problem = read(line, form).problem
    assert problem is not None
    return "\n".join(filter(None, [problem.what, problem.hint]))


def records() -> dict[str, dict[str, object]]:
    lines = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    return {str(line["id"]): line for line in lines}


@pytest.mark.parametrize(
    ("lines", "more", "failed"),
    [
        (['{"id":"a","prompt":"one"}', '{"id":"b","prompt":"two","max_tokens":1e999}', '{"id":"c","prompt":"x"}'],
         [], {"b": "max_tokens"}),
        (['{"id":"a","prompt":"one","seed":NaN}', '{"id":"c","prompt":"three"}'], [], {"a": "seed"}),
        (['{"id":"a","prompt":"x","price":2}', '{"id":"b","prompt":"x","price":"2"}'],
         ["--template", "cost {{ price + 1 }}"], {"b": "the template cannot be filled: can only concatenate str"}),
        (['{"id":"a","prompt":"x"}', '{"id":"b","prompt":"x","price":1}'],
         ["--template", "{{ text }}{{ 1 / price }}{{ 'x' * (10 ** 15) if price else '' }}"],
         {"a": "'price' is undefined", "b": "the template took more than 512 MiB of memory"}),
    ],
)  # fmt: skip
def test_one_bad_line_ends_nothing_else(
    specexec: CommandLine, lines: list[str], more: list[str], failed: dict[str, str]
) -> None:
    Path("in.jsonl").write_text("\n".join(lines))
    assert specexec("generate", "in.jsonl", "-o", "out.jsonl", *more).code == 8
    found = records()
    assert len(found) == len(lines)
    for name, record in found.items():
        assert failed.get(name, "") in str(record["error"])
        assert (record["text"] is None) == (name in failed)


def test_a_history_with_calls_is_read_as_the_server_reads_it() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    for first in (called, {**called, "content": ""}):
        item = read({"id": "x", "messages": [ASKED, first, RESULT]})
        assert item.problem is None
        message = item.prompt[1]
        assert isinstance(message, dict)
        assert "get_weather" in json.dumps(message["tool_calls"])
    ours = read({"messages": [{"role": "developer", "content": "In French."}, ASKED]})
    theirs = read({"custom_id": "t", "body": {"messages": [{"role": "developer", "content": "In French."}, ASKED]}})
    assert ours.problem is None
    assert ours.prompt == theirs.prompt
    assert "In French." in json.dumps(ours.prompt)
    assert ours.prompt_sha != read({"messages": [ASKED]}).prompt_sha


@pytest.mark.parametrize(
    ("field", "value"),
    [("guided_json", 3), ("guided_grammar", "root ::= x"), ("structured_outputs", 5), ("function_call", {"name": "f"}),
     ("modalities", ["audio"]), ("tool_choice", "required"), ("n", 99), ("stream", True), ("best_of", 3),
     ("min_tokens", "many"), ("stop_token_ids", ["x"]), ("no_repeat_ngram_size", -1), ("bad_words_ids", 3),
     ("exponential_decay_length_penalty", {"a": []}), ("frobnicate", 1), ("logit_bias", {"x": 1}),
     ("top_p", float("nan")), ("repetition_penalty", float("inf")), ("seed", 10**30),
     ("chat_template_kwargs", {"messages": []})],
)  # fmt: skip
def test_a_wish_that_cannot_be_honoured_is_an_error_that_names_it(field: str, value: object) -> None:
    assert field in refused({"custom_id": "x", "url": CHAT, "body": {"messages": [ASKED], field: value}})
    if field != "frobnicate":  # in a line of our own an unknown field is data
        assert field in refused({"id": "x", "messages": [ASKED], field: value})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [("response_format", {"type": "text"}, {}), ("logit_bias", {"5": 1.5}, {"logit_bias": ((5, 1.5),)}),
     ("ignore_eos", True, {"ignore_eos": True}), ("max_completion_tokens", 7, {"max_tokens": 7}),
     ("logprobs", True, {"logprobs": 0}), ("stop", ["a", "b"], {"stop": ("a", "b")}),
     ("repetition_penalty", 1.0, {"repetition_penalty": 1.0}), ("metadata", {"k": "v"}, {}),
     ("min_tokens", 50, {"min_tokens": 50}), ("stop_token_ids", [5, 6], {"stop_token_ids": (5, 6)}),
     ("no_repeat_ngram_size", 3, {"no_repeat_ngram_size": 3})],
)  # fmt: skip
def test_a_wish_that_can_be_honoured_reaches_the_sampler(field: str, value: object, wanted: dict[str, object]) -> None:
    item = read({"custom_id": "x", "url": CHAT, "body": {"messages": [ASKED], field: value}})
    assert item.problem is None
    run = SamplingParams(repetition_penalty=1.3)
    assert item.sampling(run) == SamplingParams(
        **{"repetition_penalty": 1.3, "seed": item.sampling(run).seed, **wanted}  # type: ignore[arg-type]
    )


def test_what_a_template_gets_belongs_to_the_item() -> None:
    plain = read({"messages": [ASKED]})
    told = read({"messages": [ASKED], "chat_template_kwargs": {"enable_thinking": False}})
    assert told.template is not None
    assert told.template.variables == {"enable_thinking": False}
    assert told.prompt_sha != plain.prompt_sha


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"url": "/v1/embeddings"}, "url \"/v1/embeddings\" is not answered; /v1/chat/completions"),
        ({"url": "/v1/responses"}, "/v1/responses"),
        ({"url": 7}, "url 7"),
        ({"method": "GET"}, 'method is "GET"; only POST'),
        ({"body": []}, "body must be a JSON object"),
        ({"body": {"prompt": "x"}}, "messages is missing"),
        ({"url": "/v1/completions"}, "prompt is missing"),
        ({"body": {"messages": "hi"}}, "messages"),
    ],
)  # fmt: skip
def test_url_and_method_of_a_request_are_looked_at(line: dict[str, object], says: str) -> None:
    whole = {"custom_id": "x", "method": "POST", "url": CHAT, "body": {"messages": [ASKED]}, **line}
    assert says in refused(whole)


def test_odd_lines_are_read_or_say_what_is_wrong() -> None:
    assert read(b'{"prompt":"line\xe2\x80\xa8sep \xc2\x85 nel"}').problem is None
    assert read({"prompt": "a\0b"}).problem is None
    assert read({"prompt": [1, 2, 3]}).prompt == [1, 2, 3]
    assert read({"prompt": "x", "id": 1.0}).id == "1.0"
    assert read({"prompt": "x", "score": float("nan"), "foo": 1}).problem is None
    assert read({"prompt": "x", "seed": -1}).problem is None
    long = 5414332823259513241
    assert read({"prompt": "x", "seed": str(long)}).sampling(SamplingParams()).seed == long
    assert in_json(long) == str(long)
    assert in_json(2**53 - 1) == 2**53 - 1
    system = read({"system": "be brief", "prompt": "x"}).prompt
    assert system == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
    for line, says in (
        (b'{"prompt":"bad \\ud83d half"}', "half a character"),
        (b'{"prompt":"first","prompt":"second"}', "field 'prompt' is there twice"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "temperature": float("inf")}, "temperature"),
        ({"prompt": ["a", "b"]}, "neither text nor messages"),
        ({"messages": '[{"role":"user","content":"hi"}]'}, "a list of messages"),
        ({"prompt": "p", "messages": [ASKED]}, "both 'prompt' and 'messages' are there.\nsay which with --field."),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "max_new_tokens": 3}, "field 'max_new_tokens' is not known.\nit is called 'max_tokens' here."),
        ({"prompt": "x", "system": 5}, "'system' is text"),
        ({"messages": []}, "neither text nor messages"),
        ({"question": "hm"}, "name it with --field."),
        ({"prompt": "x", "id": {"a": 1}}, "an id is text or a number"),
        ({"prompt": "x", "id": True}, "an id is text or a number"),
        (b'{"prompt": ' + b"[" * 2500 + b"]" * 2500 + b"}", "nested"),
        (b'{"prompt": "x", "data": ' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 100 levels deep"),
    ):  # fmt: skip
        assert says in refused(line), line


def test_sharegpt_conversations_are_asked_up_to_their_last_question() -> None:
    said = [("system", "Be brief."), ("human", "What is 2+2?"), ("gpt", "4"), ("human", "And 3+3?"), ("gpt", "6")]
    turns = [{"from": role, "value": text} for role, text in said]
    item = read({"id": "s", "conversations": turns})
    assert item.prompt == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"},
    ]  # fmt: skip
    assert item.answered
    assert not read({"conversations": turns[:-1]}).answered
    assert read({"conversations": [{"role": "user", "content": "Hello"}]}).prompt == [
        {"role": "user", "content": "Hello"}
    ]
    assert "from is one of human, user, gpt" in refused({"conversations": [{"from": "narrator", "value": "x"}]})
    for empty in ([], turns[:1], turns[2:3]):
        assert "no question" in refused({"conversations": empty})


def test_alpaca_lines_are_an_instruction_and_its_input() -> None:
    item = read({"instruction": "Translate to French", "input": "cat", "output": "chat", "text": "### all of it"})
    assert item.prompt == [{"role": "user", "content": "Translate to French\n\ncat"}]
    assert item.answered
    bare = read({"instruction": "Say hi", "input": "", "output": ""})
    assert (bare.prompt, bare.answered) == ([{"role": "user", "content": "Say hi"}], False)
    assert "empty" in refused({"instruction": "", "output": "x"})
    assert "are text" in refused({"instruction": 5, "output": "x"})
    assert read({"instruction": "Say hi", "output": ""}, Form(chat=False)).prompt == "Say hi"


def test_answers_that_training_data_brings_are_left_out_and_counted(specexec: CommandLine) -> None:
    Path("in.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": ""}\n')
    ran = specexec("generate", "in.jsonl")
    assert (ran.code, ran.out) == (0, "echo: a\necho: c\n")
    assert "lines that bring an answer to their last question, which is left out: 1\n" in ran.err


def test_further_choices_and_prompts_are_texts_of_one_record(specexec: CommandLine) -> None:
    lines = [{"id": "n", "prompt": "one", "n": 3, "max_tokens": 9}, {"id": "plain", "prompt": "two"}]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert specexec("generate", "in.jsonl", "-o", "out.jsonl", "--seed", "1").code == 0
    found = records()
    assert "choices" not in found["plain"]
    choices = found["n"]["choices"]
    assert isinstance(choices, list)
    assert [one["text"] for one in choices] == ["echo: one"] * 3
    assert len({one["seed"] for one in choices}) == 3
    assert found["n"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 27}


def test_ids_of_all_kinds_have_a_file_each_and_a_record_that_names_it(specexec: CommandLine) -> None:
    ids = ["x" * 300, "é" * 300, "x.md", "x.md/y", "X.md", "..", "", "../../etc/passwd", "a\u0301", "\u00e1", "A",
           "a", "/", "a/" * 400 + "z", ".hidden", "q?", "q*"]  # fmt: skip
    Path("in.jsonl").write_text("".join(json.dumps({"id": name, "prompt": f"<{name}>"}) + "\n" for name in ids))
    specexec.engine.context = 2000
    ran = specexec("generate", "in.jsonl", "--output-dir", "out", "-n", "2000")
    assert ran.code == 0
    assert "each record has the name as 'file'" in ran.err
    lines = [json.loads(line) for line in Path("out/records.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == set(ids)
    assert len({line["file"].casefold() for line in lines}) == len(ids)
    for line in lines:
        assert Path("out", line["file"]).read_text() == f"echo: <{line['id']}>\n"
        assert Path("out").resolve() in Path("out", line["file"]).resolve().parents
    assert specexec("generate", "in.jsonl", "--output-dir", "out", "-n", "2000", "--resume").code == 0


@pytest.mark.parametrize("name", ["out.jsonl.partial.json", "out.jsonl.manifest.json", "out.jsonl"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"items": {"a": 1}}', b"{" + b'"a":{' * 2000]
)
def test_a_damaged_file_of_a_run_is_named_or_made_again(specexec: CommandLine, name: str, content: bytes) -> None:
    Path("in.jsonl").write_text('{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}\n')
    run = ("generate", "in.jsonl", "-o", "out.jsonl", "--seed", "1")
    assert specexec(*run, "--limit", "1").code == 0
    Path("out.jsonl.partial.json").write_text("{}")
    Path(name).write_bytes(content)
    ran = specexec(*run, "--resume")
    assert ran.code in (0, 9), ran.err
    assert "Internal error" not in ran.err
    if ran.code == 9:
        assert "out.jsonl" in ran.err
    else:
        assert set(records()) == {"a", "b"}


def test_what_is_in_the_way_of_a_side_file_is_named(specexec: CommandLine) -> None:
    Path("in.jsonl").write_text('{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}\n')
    run = ("generate", "in.jsonl", "-o", "out.jsonl", "--seed", "1")
    assert specexec(*run, "--limit", "1").code == 0
    Path("out.jsonl.partial.json").mkdir()
    ran = specexec(*run, "--resume")
    assert (ran.code, "out.jsonl.partial.json cannot be read: Is a directory." in ran.err) == (3, True)
    Path("out.jsonl.partial.json").rmdir()
    Path("out.jsonl.manifest.json").unlink()
    Path("out.jsonl.manifest.json").mkdir()
    ran = specexec(*run, "--resume")
    assert (ran.code, "out.jsonl.manifest.json" in ran.err) == (3, True)


def test_lines_are_the_same_items_whatever_file_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "hi"}]}) + "\n")
    (item,) = read_inputs([], [str(path)], Form(system="Be kind.")).items
    assert item.prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
