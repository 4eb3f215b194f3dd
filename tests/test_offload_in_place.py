"""Checkpoints whose tensors begin anywhere, as in downloaded files, are read uncopied and compute the same bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

import offload
from offload.block import Piece
from offload.conversion import Part
from offload.files import LARGE_B, PAGE_B
from offload.shards import Entry
from tests.tiny import logits_of, tiny

PROMPT = torch.arange(2, 32)[None]


def original(folder: Path, residue: int) -> None:
    """A bf16 checkpoint with matrices worth reading into place, whose data begins at this place in a page."""
    model = tiny("llama", folder, hidden_size=512, intermediate_size=1024, num_attention_heads=8, head_dim=64)
    model.bfloat16().save_pretrained(folder)
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


@pytest.mark.parametrize(("residue", "in_place"), [(0, True), (8, True), (1234, True), (1235, False)])
def test_an_original_is_read_into_place_wherever_its_tensors_begin(
    residue: int, in_place: bool, tmp_path: Path, copied_B: list[int]
) -> None:
    original(tmp_path, residue)
    model = offload.load(tmp_path, "disk", dtype="bf16")
    logits = logits_of(model, PROMPT)
    stream = offload.stream_of(model)
    stream.close()
    copied_B.clear()
    again = offload.load(tmp_path, "none", dtype="bf16")
    layers_B = stream.bytes_per_sweep
    assert (sum(copied_B) < layers_B / 2) == in_place, "embeddings and head are copied once"
    assert torch.equal(logits, logits_of(again, PROMPT)), "wherever the layers live"
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
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


@given(st.data())
def test_pieces_lie_apart_and_agree_with_the_file_modulo_a_page_where_they_can(data: st.DataObject) -> None:
    offset, before = data.draw(st.integers(0, 1 << 40)), data.draw(st.integers(0, 1 << 20))
    rows = data.draw(st.sampled_from([1, 7, 1000, 4096]))
    dtype, code = data.draw(st.sampled_from([(torch.bfloat16, "BF16"), (torch.float32, "F32"), (torch.uint8, "U8")]))
    anywhere = data.draw(st.booleans())
    entry = Entry("w", Path("file"), offset, rows * 128 * dtype.itemsize, code, (rows, 128))
    piece = Piece("w", dtype, entry.shape, before, (Part(entry, "w", (128, 1), 0),))
    placed = piece.placed(anywhere)
    assert before <= placed.offset < before + PAGE_B
    assert placed.offset % dtype.itemsize == 0
    agrees = (placed.offset - offset) % PAGE_B == 0
    align_B = dtype.itemsize if anywhere and dtype.itemsize <= 2 else 64
    assert placed.offset % align_B == 0
    if offset % align_B == 0 and piece.nbytes >= LARGE_B:
        assert agrees
    if not agrees:
        assert placed.offset - before < 64, "no hole for nothing"
