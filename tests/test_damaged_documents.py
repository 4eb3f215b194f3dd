"""Documents of a checkpoint damaged in every way: a refusal that names the file, at every door, never a bug."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import offload
from offload.checkpoint import documents
from offload.checkpoint.documents import OBJECTS
from offload.hub.names import demo_folder
from specexec.compose.load import encoding_in
from tests.command_line import CommandLine
from tests.tiny import tiny

DOCUMENTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "manifest.json",
)  # fmt: skip


def into_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def into_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def into_a_dead_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "not UTF-8": lambda file: file.write_bytes(b'{"a": "\xe9\xff"}'),
    "nested deep": lambda file: file.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a list": lambda file: file.write_text("[1, 2]"),
    "a folder": into_a_folder,
    "a pipe": into_a_pipe,
    "a dead link": into_a_dead_link,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo that may be damaged, with the documents that other models have."""
    folder = Path(shutil.copytree(demo_folder("target"), tmp_path / "model"))
    for name in ("special_tokens_map.json", "manifest.json"):
        (folder / name).write_text('{"pad_token": "x"}')
    return folder


def doors(model: Path) -> dict[str, list[str]]:
    """Every command that a model is given to."""
    return {
        "chat": ["chat", "-p", "Hi", "-n", "1", "-m", str(model)],
        "generate": ["generate", "prompts.txt", "-n", "1", "-m", str(model)],
        "plan": ["plan", str(model), "--gpu", "none"],
        "pack": ["pack", str(model), "--quant", "none", "--out", "packed"],
        "models show": ["models", "show", str(model)],
    }


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_damaged_document_is_named_with_a_way_out(name: str, damage: str, model: Path, real: CommandLine) -> None:
    if name.endswith(".jinja") and damage in ("nested deep", "a list"):
        pytest.skip("these are templates, if odd ones")
    DAMAGES[damage](model / name)
    with pytest.raises(offload.OffloadError) as refused:
        encoding_in(model)
    assert refused.value.code == "bad_model_dir"
    assert str(model / name) in refused.value.what or name.endswith(".jinja")
    assert refused.value.hint is not None
    if damage in ("cut", "a folder"):
        ran = real(*doors(model)["chat"])
        assert ran.code == 4
        assert ran.err.startswith(f"Error: {refused.value.what}")


@pytest.mark.parametrize("fields", ["tokens", [1], None, {"x": 1}])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_makes_no_sense_is_refused(name: str, fields: object, model: Path) -> None:
    (model / name).write_text(json.dumps(dict.fromkeys(json.loads((model / name).read_text()), fields)))
    with pytest.raises(offload.BadModelDir, match=r"tokenizer of .* cannot be used"):
        encoding_in(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": []},
        {"num_hidden_layers": 1 << 70},
        {"num_hidden_layers": 1 << 30},
        {"pad_token_id": 1 << 70},
        {"vocab_size": 0},
        {"sliding_window": "x"},
        {"sliding_window": 1.5},
        {"sliding_window": []},
        {"sliding_window": 1 << 70},
    ],
)
def test_settings_that_nothing_can_be_built_with_are_refused_by_every_command(
    settings: dict[str, object], model: Path, real: CommandLine
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **settings}))
    for name in ("chat", "plan", "models show"):
        ran = real(*doors(model)[name])
        assert ran.code in ((4,) if name == "chat" else (0, 4)), (name, ran.err)


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "Qwen2Tokenizer"}])
def test_settings_without_a_vocabulary_are_no_tokenizer(settings: dict[str, str], model: Path) -> None:
    """transformers makes an empty tokenizer of them, which cuts every text into nothing."""
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(offload.BadModelDir, match="tokenizer"):
        encoding_in(model)


def test_documents_that_are_absent_are_no_damage(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    offload.check_documents(tmp_path)
    assert not {*OBJECTS} <= {file.name for file in tmp_path.iterdir()}


def test_a_document_is_read_once_until_something_is_written_to_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    own = documents.read_json

    def read_json(file: Path) -> dict[str, documents.Json]:
        read.append(file)
        return own(file)

    monkeypatch.setattr(documents, "read_json", read_json)
    offload.check_documents(model)
    assert model / "tokenizer.json" in read
    read.clear()
    offload.check_documents(model)
    assert not read
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text[:-1] + "]")  # of the same size
    for _ in range(2):
        with pytest.raises(offload.BadModelDir, match=r"tokenizer\.json cannot be read as JSON"):
            offload.check_documents(model)
    assert read == [model / "tokenizer.json"] * 2


NOTHING = b"\x02\0\0\0\0\0\0\0{}"
FOREIGN = b'{"x.y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
DAMAGED_TEMPLATES = ("{% if %}", "{{ (10 ** (10 ** 9)) % 7 }}")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "model.safetensors is damaged: it is empty"), (NOTHING, "holds no tensors"),
     (len(FOREIGN).to_bytes(8, "little") + FOREIGN + b"1234", "")],
)  # fmt: skip
def test_weights_that_hold_nothing_of_the_model_are_refused(
    content: bytes, said: str, model: Path, real: CommandLine
) -> None:
    (model / "model.safetensors").write_bytes(content)
    for door in ("chat", "plan", "pack", "models show"):
        ran = real(*doors(model)[door])
        told = ran.out if door == "models show" and not said else ran.err
        assert "internal" not in ran.err.lower()
        assert (said or ("x.y" if door in ("chat", "pack") else "no tensor is part of a layer")) in told
    assert real("models").code == 0


@pytest.mark.parametrize("template", DAMAGED_TEMPLATES)
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_cannot_be_read_is_refused_at_every_door(
    template: str, file: str, model: Path, real: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specexec.text.templates.SECONDS", 0.5)
    if file.endswith(".json"):
        (model / "chat_template.jinja").unlink()
        told = json.loads((model / file).read_text()) | {"chat_template": template}
        (model / file).write_text(json.dumps(told))
    else:
        (model / file).write_text(template)
    for door in ("chat", "plan", "models show"):
        ran = real(*doors(model)[door])
        assert f"the chat template of {model} is damaged: " in ran.err + ran.out


@pytest.mark.parametrize("at", [0, 8])
@pytest.mark.parametrize("door", ["chat", "plan", "pack", "models show"])
def test_a_disk_that_fails_while_headers_are_read_is_said(
    door: str, at: int, model: Path, real: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if offset == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    ran = real(*doors(model)[door])
    assert ran.code == 4
    assert f"Error: could not read {model / 'model.safetensors'}: Input/output error (errno 5)." in ran.err
    assert "\n  Try: " in ran.err
