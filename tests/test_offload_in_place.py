"""Checkpoints whose tensors begin anywhere, as in downloaded files, are read uncopied and compute the same bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import offload
from offload.checkpoint.block import TensorPart
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import open_folder
from offload.checkpoint.layout import lay_out
from offload.checkpoint.mapping import Part
from offload.checkpoint.skeleton import build
from offload.machine.files import LARGE_B, PAGE_B
from tests.tiny import logits_of, tiny

PROMPT = torch.arange(2, 32)[None]


def original(
    folder: Path, residue: int, family: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str = "5GB"
) -> None:
    """A checkpoint with matrices worth reading into place, whose data begins at this place in a page."""
    model = tiny(family, folder, hidden_size=512, intermediate_size=512, num_attention_heads=8, head_dim=64)
    (folder / "model.safetensors").unlink()
    torch.nn.Module.to(model, dtype).save_pretrained(folder, max_shard_size=shard)
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        header_B = int.from_bytes(content[:8], "little")
        header = json.dumps(json.loads(content[8 : 8 + header_B])).encode()
        header += b" " * ((residue - 8 - len(header)) % PAGE_B)
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + header_B :])


@pytest.fixture
def copied_B(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every copy out of a bounce buffer."""
    found: list[int] = []
    copyto = np.copyto

    def counted(into: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        found.append(source.nbytes)
        copyto(into, source)

    monkeypatch.setattr(np, "copyto", counted)
    return found


@pytest.mark.parametrize(
    ("residue", "family", "dtype", "in_place"),
    [
        *((residue, "llama", torch.bfloat16, residue % 2 == 0) for residue in (0, 8, 1234, 1235)),
        *((residue, "llama", torch.float32, residue % 4 == 0) for residue in (8, 1234)),
        (8, "mixtral", torch.bfloat16, True),  # stored expert by expert
        (8, "mixtral", torch.float32, True),
        (8, "gpt_oss", torch.bfloat16, True),  # stored as stacks
    ],
)
def test_an_original_is_read_into_place_wherever_its_tensors_begin(
    residue: int, family: str, dtype: torch.dtype, in_place: bool, tmp_path: Path, copied_B: list[int]
) -> None:
    original(tmp_path, residue, family, dtype)
    model = offload.load(tmp_path, "disk", dtype=dtype)
    logits = logits_of(model, PROMPT)
    stream = offload.stream_of(model)
    stream.close()
    copied_B.clear()
    again = offload.load(tmp_path, "none", dtype=dtype)
    layers_B = stream.bytes_per_sweep
    assert (sum(copied_B) < layers_B / 2) == in_place, "embeddings and head are copied once"
    assert torch.equal(logits, logits_of(again, PROMPT)), "wherever the layers live"
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits, logits_of(expected, PROMPT)), "transformers itself, from aligned memory"


def test_a_streamed_original_copies_no_more_than_the_ends_of_its_reads(tmp_path: Path, copied_B: list[int]) -> None:
    original(tmp_path, 8)
    model = offload.load(tmp_path, "disk", dtype="bf16")
    logits_of(model, PROMPT)
    copied_B.clear()
    for _ in range(3):
        logits_of(model, PROMPT)
    stream = offload.stream_of(model)
    stream.close()
    assert sum(copied_B) < 0.02 * 3 * stream.bytes_per_sweep


def test_a_layer_crosses_the_link_in_one_copy_even_with_holes(tmp_path: Path) -> None:
    original(tmp_path, 64, shard="1500KB")
    folder = open_folder(tmp_path)
    skeleton = build(folder, None)
    holes = 0
    for block in lay_out(folder, skeleton).layers:
        assert block.spans == [(block.pieces[0].offset, block.pieces[-1].offset + block.pieces[-1].nbytes)]
        holes += block.size_B - sum(piece.nbytes for piece in block.pieces)
    assert holes > PAGE_B


@given(st.data())
def test_pieces_lie_apart_and_agree_with_the_file_modulo_a_page_where_they_can(data: st.DataObject) -> None:
    offset, before = data.draw(st.integers(0, 1 << 40)), data.draw(st.integers(0, 1 << 20))
    rows = data.draw(st.sampled_from([1, 7, 1000, 4096]))
    dtype, code = data.draw(st.sampled_from([(torch.bfloat16, "BF16"), (torch.float32, "F32"), (torch.uint8, "U8")]))
    anywhere = data.draw(st.booleans())
    entry = Entry("w", Path("file"), offset, rows * 128 * dtype.itemsize, code, (rows, 128))
    piece = TensorPart("w", dtype, entry.shape, before, (Part(entry, "w", (128, 1), 0),))
    placed = piece.placed(anywhere)
    assert before <= placed.offset < before + PAGE_B
    assert placed.offset % dtype.itemsize == 0
    agrees = (placed.offset - offset) % PAGE_B == 0
    align_B = dtype.itemsize if anywhere else 64
    assert placed.offset % align_B == 0
    if offset % align_B == 0 and piece.nbytes >= LARGE_B:
        assert agrees
    if not agrees:
        assert placed.offset - before < 64, "no hole for nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_computes_the_same_from_any_address(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 1024).to(dtype)
    memory = torch.empty(weight.nbytes + 128, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    for rows in (16, 64, 256):
        hidden = torch.randn(rows, 1024).to(dtype)
        expected = torch.nn.functional.linear(hidden, weight)
        for residue in range(0, 64, dtype.itemsize):
            moved = memory[begin + residue :][: weight.nbytes].view(dtype).view(weight.shape).copy_(weight)
            assert torch.equal(torch.nn.functional.linear(hidden, moved), expected), (rows, residue)
