"""Whatever an input holds, every line and every file gives exactly one item, and no two items share a name."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cli.batch.input.form import Form
from cli.batch.input.inputs import InputShard, Split, read_inputs
from cli.batch.input.items import Item
from cli.batch.input.lines import item_of_line
from cli.batch.output.formats import RecordWriter, done_of, line_of
from cli.batch.output.sinks import AnswerFolder
from specexec.errors import EmptyPrompt
from specexec.sampling.params import SamplingParams, derived_seed
from specexec.text.messages import read_messages


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


RAW = Form(chat=False)


def read(*paths: str, form: Form = RAW, split: Split = "file", **options: object) -> list[Item]:
    return read_inputs([], paths, form, split=split, **options).items  # type: ignore[arg-type]


def problems(items: list[Item]) -> list[str | None]:
    return [item.problem.code if item.problem else None for item in items]


def test_a_text_file_is_one_prompt_or_its_lines_or_its_blocks() -> None:
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\n")
    assert [(item.id, item.prompt) for item in read("a.txt")] == [("a.txt", "one\r\ntwo\r\n\r\n\r\nthree")]
    assert [(item.id, item.prompt) for item in read("a.txt", split="lines")] == [
        ("a.txt:1", "one"), ("a.txt:2", "two"), ("a.txt:5", "three")
    ]  # fmt: skip
    assert [(item.id, item.prompt) for item in read("a.txt", split="blank")] == [
        ("a.txt:1", "one\r\ntwo"), ("a.txt:5", "three")
    ]  # fmt: skip


def test_a_folder_gives_its_files_in_order_and_tells_what_it_left() -> None:
    for name in ("in/b.txt", "in/a.md", "in/deep/c.jsonl", "in/picture.png", "in/.hidden.txt", "in/.git/x.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"prompt": "x"}')
    found = read_inputs([], ["in"], Form(chat=False))
    assert [item.id for item in found.items] == ["in/a.md", "in/b.txt", "in/deep/c.jsonl:1"]
    assert found.skipped == 1


def test_a_file_that_cannot_be_read_is_that_files_error_and_the_others_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_bytes = Path.read_bytes

    def refusing(file: Path) -> bytes:
        if file.name == "b.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    Path("in").mkdir()
    for name in ("in/a.txt", "in/b.jsonl", "in/d.txt"):
        Path(name).write_text("x")
    Path("in/c.txt").symlink_to("gone")
    items = read("in")
    assert [item.id for item in items] == ["in/a.txt", "in/b.jsonl", "in/c.txt", "in/d.txt"]
    assert problems(items) == [None, "file_refused", "file_refused", None]
    assert "in/b.jsonl cannot be read: Permission denied." in str(items[1].problem)


def test_what_comes_through_a_pipe_is_lines_if_it_looks_like_them() -> None:
    Path("in").mkdir()
    os.mkfifo("in/pipe.txt")
    assert read_inputs([], ["in"], RAW).skipped == 1, "it may never be written into"
    for content, ids in (
        ('{"prompt": "x"}\n{"prompt": "y"}\n', ["in/pipe.txt:1", "in/pipe.txt:2"]),
        ("x\ny\n", ["in/pipe.txt"]),
    ):
        writer = threading.Thread(target=Path("in/pipe.txt").write_text, args=(content,))
        writer.start()
        assert [item.id for item in read("in/pipe.txt")] == ids
        writer.join()


def test_shards_share_the_items_out_and_limit_comes_first() -> None:
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(10)))
    parts = [read("in.txt", split="lines", limit=7, shard=InputShard(part, 3)) for part in (1, 2, 3)]
    assert [[item.prompt for item in part] for part in parts] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert [item.index for item in parts[1]] == [1, 4]


def test_lines_of_openais_batch_api_are_known_by_their_shape() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9, "top_p": 0.5}
    line = {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    item = item_of_line(json.dumps(line).encode(), "f:1", Form())
    assert (item.id, item.prompt, item.problem) == ("r-1", body["messages"], None)
    wanted = SamplingParams(max_tokens=9, top_p=0.5, seed=derived_seed(4, "r-1"))
    assert item.sampling(SamplingParams(max_tokens=50, seed=4)) == wanted
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    line["body"] = {**body, "messages": [{"role": "user", "content": parts}]}
    whole = item_of_line(json.dumps(line).encode(), "f:1", Form()).prompt
    assert read_messages([one for one in whole if isinstance(one, dict)]) == item.prompt
    sound = {"type": "input_audio", "input_audio": {}}
    line["body"] = {**body, "messages": [{"role": "user", "content": [*parts, sound]}]}
    assert problems([item_of_line(json.dumps(line).encode(), "f:1", Form())]) == ["bad_jsonl"]
    raw = {"custom_id": "r-2", "url": "/v1/completions", "body": {"prompt": "Once"}}
    assert item_of_line(json.dumps(raw).encode(), "f:2", Form()).prompt == "Once"


@pytest.mark.parametrize(
    "key", ["tools", "response_format", "audio", "logprobs", "stream", "guided_json", "of_tomorrow"]
)
def test_what_cannot_be_honoured_is_refused_not_ignored(key: str) -> None:
    line = {"custom_id": "r", "body": {"messages": [{"role": "user", "content": "hi"}], key: 2}}
    item = item_of_line(json.dumps(line).encode(), "f:1", Form())
    assert item.problem is not None
    assert key in item.problem.what


def test_an_item_may_choose_its_own_sampling() -> None:
    line = {"prompt": "x", "temperature": 0, "max_tokens": 5, "seed": 3, "stop": "END", "top_k": 4.0}
    item = item_of_line(json.dumps(line).encode(), "f:1", Form())
    wanted = SamplingParams(temperature=0.0, max_tokens=5, seed=3, stop=("END",), top_k=4, min_p=0.1)
    assert item.sampling(SamplingParams(min_p=0.1, temperature=2.0, seed=99)) == wanted


@pytest.mark.parametrize(
    "wish", [{"temperature": "hot"}, {"temperature": -1}, {"top_k": 1.5}, {"stop": [1]}, {"max_tokens": True}]
)
def test_a_wish_that_makes_no_sense_is_that_items_error(wish: dict[str, object]) -> None:
    item = item_of_line(json.dumps({"prompt": "x", **wish}).encode(), "f:1", Form())
    assert item.problem is not None
    assert item.problem.code in ("bad_jsonl", "bad_sampling")


def test_a_template_takes_the_text_and_the_fields_of_a_line() -> None:
    form = Form(template="{{ text }} in {{ language }}?", system="Be brief.")
    item = item_of_line(b'{"prompt": "tree", "language": "French"}', "f:1", form)
    assert item.prompt == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "tree in French?"}
    ]  # fmt: skip
    assert problems([item_of_line(b'{"prompt": "tree"}', "f:2", form)]) == ["bad_jsonl"]


def test_a_system_message_of_its_own_is_not_doubled() -> None:
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "hi"}]
    assert Form(system="Yours.").prompt(messages, "f:1") == messages  # type: ignore[arg-type]


def test_an_id_may_be_used_once() -> None:
    Path("in.jsonl").write_text(
        "".join(json.dumps({"id": "same", "prompt": str(number)}) + "\n" for number in range(3))
    )
    items = read("in.jsonl")
    assert [item.id for item in items] == ["same", "same#2", "same#3"]
    assert problems(items) == [None, "duplicate_id", "duplicate_id"]


def test_items_that_ask_the_same_name_the_first_one_also_across_shards() -> None:
    wishes: list[dict[str, object]] = [{}, {}, {"temperature": 0.5}, {}, {"temperature": 0.5}]
    lines = [{"id": f"i{number}", "prompt": "same", **wish} for number, wish in enumerate(wishes)]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "nonsense\nnonsense\n")
    found = read("in.jsonl", dedupe=True)
    assert [item.duplicate_of for item in found] == [None, "i0", None, "i0", "i2", None, None]
    assert found[0].sampling(SamplingParams(seed=1)) == found[3].sampling(SamplingParams(seed=1))
    shard = read("in.jsonl", dedupe=True, shard=InputShard(2, 2))
    assert [item.duplicate_of for item in shard] == ["i0", "i0", None]
    assert {item.duplicate_of for item in read("in.jsonl")} == {None}


JSONS = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = some.fixed_dictionaries(
    {},
    optional={
        "id": JSONS, "custom_id": JSONS, "prompt": JSONS, "messages": JSONS, "text": JSONS, "body": JSONS,
        "temperature": JSONS, "stop": JSONS, "seed": JSONS,
    },
)  # fmt: skip
LINES = some.one_of(
    OBJECTS.map(lambda record: json.dumps(record).encode()),  # lone surrogates, NaN and huge numbers included
    JSONS.map(lambda value: json.dumps(value, ensure_ascii=True).encode()),
    some.binary(max_size=40),
    some.sampled_from(
        [b"", b"  ", b"\xef\xbb\xbf{}", b"\0", b"[" * 5000, b'{"prompt": "x"}\r', b'{"prompt": "\xff"}',
         b'{"prompt": "\\ud800"}', b'{"id": "\\ud800", "prompt": "x"}', b'{"prompt": 1e999}', b"9" * 5000]
    ),
)  # fmt: skip


@given(some.lists(LINES, max_size=6), some.booleans())
def test_any_bytes_give_one_item_a_line_and_one_record_an_item(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], bom: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    content = (b"\xef\xbb\xbf" if bom else b"") + b"\n".join(lines)
    path.write_bytes(content)
    items = read(str(path), form=Form())
    assert len(items) == sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    assert len({item.id for item in items}) == len(items)
    for item in items:
        if item.problem is None:
            item.sampling(SamplingParams())
        record = RecordWriter("jsonl", "m").failed(item, item.problem or EmptyPrompt("x"))
        done = done_of(line_of(record))
        assert done is not None
        assert (done.id, done.prompt_sha) == (item.id, item.prompt_sha)


@given(some.lists(some.text(min_size=1, max_size=20), unique=True, max_size=6))
def test_text_files_never_collide_and_never_leave_their_folder(names: list[str]) -> None:
    root = Path("/results")
    files = AnswerFolder.of(root, names).names
    assert len({file.casefold() for file in files.values()}) == len(set(names))
    for file in files.values():
        assert root in (root / file).parents
        assert ".." not in Path(file).parts


def test_a_line_of_ten_megabytes_is_a_line() -> None:
    Path("in.jsonl").write_text(json.dumps({"prompt": "x" * 10_000_000}) + "\n")
    assert problems(read("in.jsonl")) == [None]


def test_ten_thousand_lines_with_a_hundred_bad_ones_are_read_in_seconds() -> None:
    lines = [b'{"prompt": "good"}' if number % 100 else b'{"prompt": ' for number in range(10_000)]
    Path("in.jsonl").write_bytes(b"\n".join(lines))
    found = problems(read("in.jsonl"))
    assert (found.count(None), found.count("bad_jsonl")) == (9_900, 100)
