"""GGUF files run as they lie: weights as gguf-py dequantises them, bit for bit, text as transformers writes it."""

import json
import os
import random
import shutil
import struct
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import offload
import specexec
from cli.chat.saving import stored_name
from cli.serve.command import short_name
from offload.checkpoint.entry import Entry
from offload.checkpoint.gguf.ggml_types import BY_NAME
from offload.checkpoint.gguf.header import read_gguf
from offload.checkpoint.headers import Folder, open_folder
from offload.checkpoint.quantized.arithmetic import ggml_blocks
from offload.checkpoint.quantized.arithmetic.compiled import compiled, fill_groups
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.stored import fold
from offload.errors import BadModelDir, CorruptShard, OffloadError, UnsupportedModel
from offload.hub.local_models import describe
from offload.hub.names import called, resolve
from offload.hub.other_apps import MODEL_LAYER, AppModel, models_of_apps
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.placement.requirements import need_of
from tests import real
from tests.gguf_files import END, Kind, dense_of, write_gguf
from tests.tiny import greedy, logits_of, tiny

TIERS: tuple[Offload, ...] = ("none", "ram", "disk")
PROMPT = torch.arange(2, 32)[None]
WRITTEN = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny llama in Q4_0."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(tiny("llama", folder / "dense"), folder / "tiny.gguf", Kind.Q4_0)
    return folder


def random_blocks(name: str, count: int) -> np.ndarray:
    """Blocks of any bytes, but for scales, which are finite."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, BY_NAME[name].nbytes), dtype=np.uint8)
    pairs = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82)}
    halves = {"Q3_K": (108,), "Q6_K": (208,), "MXFP4": (), **pairs}
    if name == "MXFP4":  # no sums beyond float32, of which numpy warns
        blocks[:, 0] %= 250
    scales = np.random.default_rng(1).standard_normal((count, 4)).astype(np.float16)
    for index, place in enumerate(halves.get(name, (0,))):
        blocks[:, place : place + 2] = scales[:, index : index + 1].view(np.uint8)
    return blocks


@pytest.mark.parametrize("by_numba", [True, False])
@pytest.mark.parametrize("name", [name for name, kind in BY_NAME.items() if kind.plain is None])
def test_blocks_become_what_gguf_py_makes_of_them(
    name: str, by_numba: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By numba's loop, and by torch: for a GPU, and for a Python that numba does not know yet."""
    assert compiled(fill_groups) is not None
    if not by_numba:
        monkeypatch.setattr(ggml_blocks, "compiled", lambda _: None)
    rows, each = 70, 6
    blocks = random_blocks(name, rows * each).reshape(rows, -1)
    entry = Entry(f"x.weight.gguf.{name}", tmp_path, 0, blocks.nbytes, "U8", blocks.shape)
    (weight,) = fold(Folder(tmp_path, {}, {entry.name: entry}, {})).quantised.values()
    expected = torch.from_numpy(gguf.dequantize(blocks, getattr(Kind, name)))
    assert weight.shape == tuple(expected.shape)
    before = torch.get_num_threads()
    for threads, dtype in ((1, torch.float32), (3, torch.bfloat16), (1, torch.float16)):
        torch.set_num_threads(threads)
        dense = torch.empty(weight.shape, dtype=dtype)
        dequantise(weight, {"codes": torch.from_numpy(blocks)}, dense)
        assert torch.equal(dense.view(torch.int16), expected.to(dtype).view(torch.int16))
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_a_file_computes_what_its_dequantised_weights_compute(kind: Kind, tmp_path: Path) -> None:
    dense = tiny("llama", tmp_path / "dense")
    file = write_gguf(dense, tmp_path / "tiny.gguf", kind)
    expected = logits_of(dense_of(dense, kind), PROMPT)
    for tier in TIERS:
        assert torch.equal(logits_of(offload.load(file, tier, dtype="f32"), PROMPT), expected), tier


@cache
def reader_of(file: Path) -> GGUFReader:
    """gguf-py's reader of a file, made once: it takes seconds for the words of a real vocabulary."""
    return GGUFReader(file)


def test_a_real_file_writes_the_text_that_transformers_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    file = real.gguf()
    # transformers reads a file anew for its config, its weights and its tokenizer, and makes all names for each module.
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader_of(Path(path)))
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with specexec.load(str(file), dtype="f32", offload="disk", drafter="ngram") as engine:
        tokens = engine.encoding.encode([{"role": "user", "content": "Name 3 colours."}])
        chat: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Name 3 colours."}], add_generation_prompt=True
        )
        assert tokens == chat["input_ids"]
        written = engine.generate(tokens, specexec.SamplingParams(temperature=0.0, max_tokens=5)).tokens
    assert [*written] == greedy(theirs, torch.tensor([tokens]), 5)[0, len(tokens) :].tolist()


def test_headers_are_read_as_gguf_py_reads_them() -> None:
    file = real.gguf()
    theirs = reader_of(file)
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    ours = read_gguf(file, lists)
    assert [(one.name, one.data_offset, one.n_bytes) for one in theirs.tensors] == [
        (one.name, one.offset, one.nbytes) for one in ours.tensors
    ]
    assert ours.metadata == {
        name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert read_gguf(file).metadata["tokenizer.ggml.tokens"] == 49152  # its length alone


def test_a_file_is_a_target_and_a_drafter(made: Path) -> None:
    file = str(made / "tiny.gguf")
    sampling = specexec.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with specexec.load(file, drafter="none", dtype="f32") as plain:
        expected = plain.generate("hello", sampling).tokens
    with specexec.load(file, drafter=file, dtype="f32") as drafted:
        answer = drafted.generate("hello", sampling)
    assert answer.tokens == expected
    assert answer.sweeps < 16  # its guesses are its own choices


def test_headers_alone_tell_what_a_file_needs(made: Path) -> None:
    need = need_of(open_folder(made / "tiny.gguf"), 4, 512)
    loaded = offload.load(made / "tiny.gguf", "disk", dtype="f32", ctx=512)
    placement = offload.stream_of(loaded).placement
    assert need.read_B == placement.need.read_B
    assert need.dense_B == placement.need.dense_B
    assert all(a >= b for a, b in zip(need.layers_B, placement.need.layers_B, strict=True))


def test_a_pack_keeps_the_blocks(made: Path, tmp_path: Path) -> None:
    pack(plan(open_folder(made / "tiny.gguf"), "none"), tmp_path / "pack")
    expected = logits_of(offload.load(made / "tiny.gguf", "none", dtype="f32"), PROMPT)
    assert torch.equal(logits_of(offload.load(tmp_path / "pack", "disk", dtype="f32"), PROMPT), expected)
    described = describe(tmp_path / "pack")
    assert (described.format, described.loads_in_transformers) == ("q4_0", False)
    with pytest.raises(UnsupportedModel, match=r"tiny\.gguf is quantised already"):
        plan(open_folder(made / "tiny.gguf"), "nf4")


def test_split_files_are_one_model(made: Path, tmp_path: Path) -> None:
    dense = tiny("llama", tmp_path / "dense")
    first = write_gguf(dense, tmp_path / "split.gguf", Kind.Q4_0, split=11)
    assert first.name == "split-00001-of-00004.gguf"
    expected = logits_of(offload.load(made / "tiny.gguf", "none", dtype="f32"), PROMPT)
    for path in (first, first.with_name("split-00003-of-00004.gguf"), tmp_path):
        assert torch.equal(logits_of(offload.load(path, "ram", dtype="f32"), PROMPT), expected)
    swapped = first.with_name("split-00002-of-00004.gguf")
    swapped.write_bytes(first.with_name("split-00003-of-00004.gguf").read_bytes())
    with pytest.raises(CorruptShard, match="part 2 of 4, it lies there as part 1"):
        open_folder(first)
    swapped.unlink()
    with pytest.raises(BadModelDir, match=r"split-00002-of-00004\.gguf is missing"):
        open_folder(first)


def test_a_folder_of_several_models_names_them(made: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        shutil.copy(made / "tiny.gguf", tmp_path / name)
    with pytest.raises(BadModelDir, match=r"2 GGUF models: a\.gguf, b\.gguf"):
        open_folder(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert open_folder(tmp_path).called == tmp_path / "a.gguf"


def test_a_file_without_a_suffix_is_known_by_its_first_bytes(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "tiny.gguf", tmp_path / "sha256-0123")
    assert open_folder(tmp_path / "sha256-0123").model_type == "llama"


def test_a_file_that_changes_is_described_anew(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    shutil.copy(made / "tiny.gguf", file)
    documents = open_folder(file).path
    assert open_folder(file).path == open_folder(documents).path == documents
    before = (documents / "config.json").read_text()
    write_gguf(tiny("qwen3", tmp_path / "dense"), file)
    assert open_folder(file).model_type == "qwen3"
    assert (documents / "config.json").read_text() != before
    file.unlink()
    with pytest.raises(BadModelDir, match=r"model\.gguf is gone"):
        open_folder(documents)


def test_a_file_is_named_as_a_folder_is(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert short_name("tiny.gguf") == short_name(str(made / "tiny.gguf")) == "tiny"  # clients see no path
    assert stored_name("tiny.gguf") == str(made / "tiny.gguf")
    assert resolve("tiny.gguf").target == open_folder(made / "tiny.gguf").path
    assert called(resolve("tiny.gguf").target) == "tiny"


def test_the_tokenizer_is_the_one_of_the_file(made: Path) -> None:
    folder = open_folder(made / "tiny.gguf").path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the " + END)["input_ids"]
    assert ids == [ord("t"), 254, ord(" "), 255]
    assert tokenizer.decode(ids) == "the " + END
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x" + END
    assert len(tokenizer) == 256


def test_an_unknown_way_of_cutting_text_is_refused_with_a_way_out(made: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    file = write_gguf(tiny("llama", tmp_path / "dense"), tmp_path / "odd" / "odd.gguf", pre="nobody-knows")
    with pytest.raises(UnsupportedModel, match="cuts text by the rule 'nobody-knows'") as refusal:
        open_folder(file)
    assert "the model's own tokenizer.json" in str(refusal.value.hint)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(open_folder(made / "tiny.gguf").path / name, file.parent / name)
    folder = open_folder(file.parent)
    assert AutoTokenizer.from_pretrained(folder.path)("the")["input_ids"] == [ord("t"), 254]


def test_what_cannot_be_read_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    big = write_gguf(tiny("llama", tmp_path / "dense"), tmp_path / "big.gguf", big=True)
    with pytest.raises(UnsupportedModel, match="in the order of big-endian machines"):
        open_folder(big)
    good = (made / "tiny.gguf").read_bytes()
    for change, says in {
        "version": (good[:4] + struct.pack("<I", 1) + good[8:], "is version 1"),
        "architecture": (good.replace(b"llama", b"alpha"), "architecture whose names are not known"),
        "cut": (good[: len(good) // 2], "ends at byte"),
        "short": (good[:100], "where 12 bytes can follow|bytes can follow"),
    }.values():
        (tmp_path / "bad.gguf").write_bytes(change)
        with pytest.raises(OffloadError, match=says):
            open_folder(tmp_path / "bad.gguf")


def test_a_damaged_header_is_refused_and_never_more(made: Path, tmp_path: Path) -> None:
    """SPECEXEC_MUTATIONS sets how many; more of them run by hand."""
    good = (made / "tiny.gguf").read_bytes()
    header_B = min(tensor.offset for tensor in read_gguf(made / "tiny.gguf").tensors)
    chance = random.Random(0)
    file = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(int(os.environ.get("SPECEXEC_MUTATIONS", "300"))):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            # Lengths and counts lie before names: small bytes and large ones are what damages them.
            place, width = chance.randrange(header_B), chance.choice((1, 1, 4, 8))
            damaged[place : place + width] = chance.choice(
                (
                    chance.randbytes(width),
                    b"\xff" * width,
                    b"\0" * width,
                    struct.pack("<Q", chance.randrange(999))[:width],
                )
            )
        file.write_bytes(damaged if chance.random() < 0.9 else damaged[: chance.randrange(header_B)])
        try:
            folder = open_folder(file)
            assert all(entry.offset + entry.nbytes <= len(good) for entry in folder.entries.values())
        except OffloadError:
            refused += 1
    assert refused


def test_a_count_of_blocks_is_compared_with_those_that_are_there(made: Path, tmp_path: Path) -> None:
    """Nothing is made that is as long as the header claims."""
    content = (made / "tiny.gguf").read_bytes()
    field = b"llama.block_count" + struct.pack("<I", 4)
    assert content.count(field + struct.pack("<I", 4)) == 1
    huge = content.replace(field + struct.pack("<I", 4), field + struct.pack("<I", (1 << 31) - 1))
    (tmp_path / "huge.gguf").write_bytes(huge)
    with pytest.raises(CorruptShard, match=r"block_count is 2147483647, and there are tensors of 4 blocks"):
        open_folder(tmp_path / "huge.gguf")


def test_files_of_other_programs_are_listed_by_their_names(made: Path, tmp_path: Path) -> None:
    lm_studio = tmp_path / ".lmstudio" / "models" / "publisher" / "tiny-GGUF"
    manifest = tmp_path / ".ollama" / "models" / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1b"
    blob = tmp_path / ".ollama" / "models" / "blobs" / "sha256-12ab"
    for folder in (lm_studio, manifest.parent, blob.parent):
        folder.mkdir(parents=True)
    for name in ("tiny.gguf", "mmproj-tiny.gguf", "part-00001-of-00002.gguf", "part-00002-of-00002.gguf"):
        shutil.copy(made / "tiny.gguf", lm_studio / name)
    shutil.copy(made / "tiny.gguf", blob)
    layers = [{"mediaType": MODEL_LAYER, "digest": "sha256:12ab"}, {"mediaType": "other", "digest": "sha256:0"}]
    manifest.write_text(json.dumps({"layers": layers}))
    for name, content in {
        "broken": "{",
        "elsewhere": json.dumps({"layers": [{**layers[0], "digest": "../x"}]}),
    }.items():
        manifest.with_name(name).write_text(content)
    assert models_of_apps(tmp_path, tmp_path / ".ollama" / "models") == [
        AppModel("Ollama", "tiny:1b", blob),
        AppModel("LM Studio", "publisher/tiny-GGUF", lm_studio / "part-00001-of-00002.gguf"),
        AppModel("LM Studio", "publisher/tiny-GGUF", lm_studio / "tiny.gguf"),
    ]
    described = describe(blob)
    assert (described.architecture, described.layers, described.format) == ("llama", 4, "q4_0")
