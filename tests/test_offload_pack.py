"""Packs: the same model in a layout for streaming. Nothing is lost, whenever the machine stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import offload
from offload.checkpoint.contents import INDEX, MANIFEST
from offload.checkpoint.headers import open_folder, read_header
from offload.checkpoint.manifest import read_manifest, verify
from offload.checkpoint.quantized.quantize import Quant
from offload.checkpoint.quantized.stored import fold
from offload.errors import BadModelDir, DiskFull, OutputExists, ReadFailed, UnsupportedModel
from offload.packs.pack import pack, plan
from offload.packs.writer import write
from offload.placement.placement import Offload
from specexec.model.tree_lm import TreeLM
from specexec.sampling.params import SamplingParams
from tests.test_offload_quant import PROMPT, unpacked
from tests.tiny import LAYERS, greedy, in_float32, logits_of, tiny
from tests.writing import drafters, prompt
from tests.writing import write as write_text

TIERS: tuple[Offload, ...] = ("none", "ram", "disk")


def packed(source: Path, out: Path, quant: Quant) -> Path:
    pack(plan(open_folder(source), quant), out)
    return out


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "mixtral", "gpt_oss"])
def test_a_dense_pack_is_a_checkpoint_for_transformers(family: str, tmp_path: Path) -> None:
    original = tiny(family, tmp_path / "original", max_shard_size="100KB")
    path = packed(tmp_path / "original", tmp_path / "pack", "none")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(logits_of(theirs, PROMPT), logits_of(original, PROMPT))
    assert torch.equal(greedy(theirs, PROMPT, 8), greedy(original, PROMPT, 8))
    ours = offload.load(path, "disk")
    assert torch.equal(logits_of(ours, PROMPT), logits_of(original, PROMPT))
    offload.stream_of(ours).close()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_quantised_pack_streams_exactly_what_it_holds(family: str, quant: Quant, tmp_path: Path) -> None:
    dense = tiny(family, tmp_path / "original")
    path = packed(tmp_path / "original", tmp_path / "pack", quant)
    tensors, folded = stored_tensors(path), fold(open_folder(path))
    # The reference: the original with every quantised weight put back dequantised, loaded by transformers.
    changed = {name: unpacked(weight, tensors, torch.float32) for name, weight in folded.quantised.items()}
    original = load_file(tmp_path / "original" / "model.safetensors")
    (tmp_path / "reference").mkdir()
    shutil.copy(tmp_path / "original" / "config.json", tmp_path / "reference")
    write(tmp_path / "reference" / "model.safetensors", [original | changed])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float32)
    expected = logits_of(theirs, PROMPT)
    assert not torch.equal(expected, logits_of(dense, PROMPT))
    for tier in TIERS:
        ours = offload.load(path, tier)
        assert torch.equal(logits_of(ours, PROMPT), expected), tier
        offload.stream_of(ours).close()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_what_is_quantised_are_the_linear_weights_of_the_layers(quant: Quant, tmp_path: Path) -> None:
    for family, count in (("llama", 7), ("mixtral", 4 + 3 * 4), ("gpt_oss", 4 + 2)):
        tiny(family, tmp_path / family)
        folded = fold(open_folder(packed(tmp_path / family, tmp_path / f"{family}-pack", quant)))
        assert len(folded.quantised) == LAYERS * count, family
        assert all(".layers." in name and "router" not in name for name in folded.quantised)


def test_transformers_loads_an_nf4_pack(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "original", intermediate_size=128)
    path = packed(tmp_path / "original", tmp_path / "pack", "nf4")
    theirs = in_float32(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu"))
    assert type(theirs.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    ours = offload.load(path, "disk")
    torch.testing.assert_close(logits_of(theirs, PROMPT), logits_of(ours, PROMPT), rtol=1e-4, atol=1e-4)
    offload.stream_of(ours).close()
    assert (read_manifest(path) or {})["loads_in_transformers"] is True


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_data_starts_at_a_page_and_weights_at_a_cache_line(quant: Quant, tmp_path: Path) -> None:
    tiny("qwen2", tmp_path / "original", intermediate_size=100)
    path = packed(tmp_path / "original", tmp_path / "pack", quant)
    files = sorted(path.glob("*.safetensors"))
    assert [file.name for file in files] == [*(f"layer-{i:05d}.safetensors" for i in range(LAYERS)), "rest.safetensors"]
    for file in files:
        entries = sorted(read_header(file)[1].values(), key=lambda entry: entry.offset)
        assert entries[0].offset % 4096 == 0
        odd = [entry for entry in entries if entry.nbytes % 64]
        assert all(entry.offset % 64 == 0 for entry in entries[: len(entries) - len(odd)])
        assert entries[len(entries) - len(odd) :] == odd
        with safe_open(file, "pt") as opened:  # the library itself finds nothing wrong
            assert set(opened.keys()) == {entry.name for entry in entries}


def test_the_layout_of_a_file_is_golden(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(32, dtype=torch.int16),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "a": torch.ones(32, dtype=torch.float32),
        "scale": torch.tensor([1.0]),
    }
    written = write(tmp_path / "x.safetensors", [tensors])
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[32],"data_offsets":[0,128]},'
        b'"b":{"dtype":"I16","shape":[32],"data_offsets":[128,192]},'
        b'"scale":{"dtype":"F32","shape":[1],"data_offsets":[192,196]},'
        b'"odd":{"dtype":"U8","shape":[3],"data_offsets":[196,199]}}'
    )
    expected = (4088).to_bytes(8, "little") + header.ljust(4088)
    expected += b"\x00\x00\x80\x3f" * 32 + b"".join(i.to_bytes(2, "little") for i in range(32))
    expected += b"\x00\x00\x80\x3f" + b"\x01\x02\x03"
    assert (tmp_path / "x.safetensors").read_bytes() == expected
    assert written.size_B == len(expected)


def test_a_finished_pack_is_verified_by_hash(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "original")
    path = packed(tmp_path / "original", tmp_path / "pack", "int8")
    assert verify(path) == []
    assert not list(path.glob("*.partial"))
    flip(path / "layer-00002.safetensors")
    (path / "rest.safetensors").unlink()
    assert verify(path) == ["layer-00002.safetensors", "rest.safetensors"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_pack_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "original")
    whole = packed(tmp_path / "original", tmp_path / "whole", "nf4")
    path = packed(tmp_path / "original", tmp_path / "pack", "nf4")
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["shards"]["layer-00003.safetensors"]
    (path / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))
    (path / "config.json").unlink()
    flip(path / "layer-00001.safetensors")
    kept = path / "layer-00000.safetensors"
    before = kept.stat().st_mtime_ns
    packed(tmp_path / "original", path, "nf4")
    assert kept.stat().st_mtime_ns == before
    assert content_of(path) == content_of(whole)


def content_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


KILLED_IN_LAYER_3 = """
import os, signal, sys
from pathlib import Path
from cli.engine.imports import lean_imports
with lean_imports():
    from offload.checkpoint.headers import open_folder
    from offload.packs.pack import pack, plan
sync = os.fsync
def kill(descriptor):
    if "layer-00003" in os.readlink(f"/proc/self/fd/{descriptor}"):  # its bytes are written, its name is not
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = kill
pack(plan(open_folder(Path(sys.argv[1])), "int8"), Path(sys.argv[2]))
"""


def test_a_killed_pack_is_no_model_and_can_be_finished(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "original", num_hidden_layers=8)
    path = tmp_path / "pack"
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_LAYER_3, str(tmp_path / "original"), str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert (path / "layer-00002.safetensors").exists()
    assert not (path / "layer-00003.safetensors").exists()
    assert not (path / "config.json").exists()
    with pytest.raises(BadModelDir, match="is a pack that is not finished"):
        open_folder(path)
    packed(tmp_path / "original", path, "int8")
    assert content_of(path) == content_of(packed(tmp_path / "original", tmp_path / "whole", "int8"))


def test_a_full_disk_is_known_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", tmp_path / "original")
    usage = shutil.disk_usage(tmp_path)._replace(free=1024)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match=r"packing needs .* more on the disk of .*, 1.0 KiB are free"):
        packed(tmp_path / "original", tmp_path / "pack", "none")


def test_a_disk_that_fills_up_leaves_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", tmp_path / "original")
    path, real, calls = tmp_path / "pack", os.fsync, iter(range(1000))

    def full(fd: int) -> None:
        if next(calls) > 8:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull, match="could not be written: No space left on device"):
        packed(tmp_path / "original", path, "none")
    monkeypatch.setattr("os.fsync", real)
    assert not (path / "config.json").exists()
    assert not list(path.glob("*.partial"))
    assert verify(path) == []
    assert (read_manifest(path) or {})["shards"]
    packed(tmp_path / "original", path, "none")
    assert len(verify(path)) == 0


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "original")
    tiny("llama", tmp_path / "other", num_hidden_layers=2)
    before = content_of(tmp_path / "original")
    with pytest.raises(OutputExists, match="holds the originals"):
        packed(tmp_path / "original", tmp_path / "original", "none")
    with pytest.raises(OutputExists, match="is not empty"):
        packed(tmp_path / "other", tmp_path / "original", "none")
    packed(tmp_path / "original", tmp_path / "pack", "none")
    for source, quant in (("original", "int8"), ("other", "none")):
        with pytest.raises(OutputExists, match="holds a pack of another model"):
            packed(tmp_path / source, tmp_path / "pack", quant)  # type: ignore[arg-type]
    assert content_of(tmp_path / "original") == before


def test_a_quantised_model_is_not_quantised_again_but_can_be_laid_out(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "original")
    first = packed(tmp_path / "original", tmp_path / "first", "nf4")
    with pytest.raises(UnsupportedModel, match="is quantised already"):
        packed(first, tmp_path / "second", "int8")
    second = packed(first, tmp_path / "second", "none")
    assert json.loads((second / INDEX).read_text()) == json.loads((first / INDEX).read_text())
    assert (second / "layer-00000.safetensors").read_bytes() == (first / "layer-00000.safetensors").read_bytes()


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    tiny("mixtral", tmp_path / "original")
    tiny("gpt_oss", tmp_path / "original2")
    for name in ("original", "original2"):
        for quant in ("none", "int8", "nf4"):
            wanted = plan(open_folder(tmp_path / name), quant)
            pack(wanted, tmp_path / f"{name}-{quant}")
            found = sum(file.stat().st_size for file in (tmp_path / f"{name}-{quant}").glob("*.safetensors"))
            # Headers of tiny shards take more than their data; they are not counted to the byte.
            assert abs(wanted.size_B - found) <= 12288 * len(wanted.shards), quant


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_trees_over_a_quantised_mixture_write_what_plain_decoding_writes(quant: Quant, tmp_path: Path) -> None:
    tiny("mixtral", tmp_path / "original")
    path = packed(tmp_path / "original", tmp_path / "pack", quant)
    sampling = SamplingParams(max_tokens=12, temperature=0.8, seed=3)
    found = drafters("mixtral", tmp_path)
    texts = set()
    ways: list[tuple[str, Offload, int]] = [
        ("none", "none", 0), ("perfect", "disk", 3), ("useless", "ram", 16), ("blind", "disk", 40)
    ]  # fmt: skip
    for name, tier, budget in ways:
        model = offload.load(path, tier)
        (sequence,) = write_text(TreeLM(model), found[name], [prompt(9)], sampling, budget)
        texts.add(tuple(sequence.tokens))
        offload.stream_of(model).close()
    assert len(texts) == 1


def test_a_pack_is_never_made_of_old_and_new_originals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny("llama", tmp_path / "old", seed=0, max_shard_size="100KB")
    tiny("llama", tmp_path / "new", seed=1, max_shard_size="100KB")
    folder, out = tmp_path / "old", tmp_path / "pack"

    def replace_in_place() -> None:
        for file in (tmp_path / "new").glob("*.safetensors"):
            before = (folder / file.name).stat()
            with (folder / file.name).open("r+b") as same:
                same.write(file.read_bytes())
            os.utime(folder / file.name, ns=(before.st_atime_ns, before.st_mtime_ns))

    finished = []

    def advance(nbytes: int) -> None:
        finished.append(nbytes)
        if len(finished) == 2:
            replace_in_place()

    with pytest.raises(ReadFailed, match="were written to while they were packed"):
        pack(plan(open_folder(folder), "none"), out, advance=advance)
    pack(plan(open_folder(folder), "none"), out)
    assert "all of it is written anew" in caplog.text
    expected = logits_of(offload.load(tmp_path / "new", "none"), PROMPT)
    assert torch.equal(logits_of(offload.load(out, "none"), PROMPT), expected)
