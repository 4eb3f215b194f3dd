"""Files of torch.save: their tensors are found where they lie, and whatever else a pickle asks for is refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.checkpoint.headers import read_header
from offload.checkpoint.pickled.tensors import _view, read_pickled
from offload.checkpoint.tensors import DTYPES, load_entry
from offload.errors import CorruptShard, OffloadError, UnsupportedModel


def test_tensors_are_what_torch_loads(tmp_path: Path) -> None:
    """All types, scalars, parts of others, two names of one tensor, parameters; saved as a state dict is."""
    whole = torch.randn(6, 4)
    state = nn.Linear(3, 5).state_dict()
    state |= {
        "whole": whole,
        "part": whole[2:4],
        "again": whole,
        "scalar": torch.tensor(3.5),
    }
    state |= {str(one): torch.arange(5).to(one) for one in (torch.float16, torch.bfloat16, torch.float64, torch.int32)}
    state |= {"ids": torch.arange(4), "mask": torch.tensor([True, False]), "own": nn.Parameter(whole[:1].clone())}
    torch.save(state, tmp_path / "head.pt")
    loaded = torch.load(tmp_path / "head.pt", weights_only=True)
    found = read_pickled(tmp_path / "head.pt")
    assert found.keys() == loaded.keys()
    for name, entry in found.items():
        assert torch.equal(load_entry(entry, DTYPES[entry.dtype]), loaded[name]), name
        assert entry.shape == tuple(loaded[name].shape)


class Command:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Command(tmp_path / "ran")}, tmp_path / "head.pt")
    with pytest.raises(UnsupportedModel, match=r"asks for posix\.mkdir, which is more than tensors") as caught:
        read_pickled(tmp_path / "head.pt")
    assert caught.value.hint
    assert not (tmp_path / "ran").exists()
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UnsupportedModel, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        read_pickled(tmp_path / "module.pt")


def test_what_is_no_state_dict_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "head.pt"
    for held, why in (
        ([torch.zeros(2)], "holds something else than tensors by name"),
        ({"inner": {"weight": torch.zeros(2)}}, "holds something else than tensors by name"),
        ({"turned": torch.zeros(3, 2).T}, "'turned' in another order than row by row"),
    ):
        torch.save(held, file)
        with pytest.raises(UnsupportedModel, match=why):
            read_pickled(file)
    torch.save({"weight": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedModel, match=r"since torch 1\.6"):
        read_pickled(file)


def test_a_damaged_file_is_refused_whatever_is_damaged(tmp_path: Path) -> None:
    """Cut anywhere, or a byte of its description changed: never an error without words, never a wrong place."""
    file, odd = tmp_path / "head.pt", tmp_path / "odd.pt"
    torch.save({"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3)}, file)
    whole = file.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        odd.write_bytes(whole[:cut])
        with pytest.raises(OffloadError):
            read_pickled(odd)
    with zipfile.ZipFile(file) as held:
        records = {name: held.read(name) for name in held.namelist()}
    (description,) = (name for name in records if name.endswith("data.pkl"))
    for at in range(0, len(records[description]), 3):
        changed = bytearray(records[description])
        changed[at] ^= 0x15
        with zipfile.ZipFile(odd, "w") as made:
            for name, held_bytes in records.items():
                made.writestr(name, bytes(changed) if name == description else held_bytes)
        try:
            found = read_pickled(odd)
        except OffloadError:
            continue
        for entry in found.values():
            assert 0 <= entry.offset <= entry.offset + entry.nbytes <= odd.stat().st_size


def test_records_that_do_not_hold_what_is_described_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "head.pt"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("head/data.pkl", pickle.dumps({}))
        made.writestr("head/byteorder", b"big")
    with pytest.raises(UnsupportedModel, match="the other way round"):
        read_pickled(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("head/data.pkl", pickle.dumps({}))
    with pytest.raises(CorruptShard, match="compressed"):
        read_pickled(file)


def saved(file: Path, description: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("head/data.pkl", description)
    return file


def test_what_a_pickle_says_of_objects_changes_none_of_ours(tmp_path: Path) -> None:
    """A state for the function that describes tensors, and one that hides a dictionary's methods."""
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    file = saved(tmp_path / "head.pt", b"\x80\x02" + function + b"}X\x05\x00\x00\x00extraK\x01sb.")
    with pytest.raises(UnsupportedModel, match="something else than tensors"):
        read_pickled(file)
    assert not vars(_view)
    hidden = b"\x80\x02ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemsK\x01X\x06\x00\x00\x00valuesK\x01ub."
    assert read_pickled(saved(tmp_path / "named.pt", hidden)) == {}


class Placed:
    """A tensor of four bytes, of the shape that a pickle says it has."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor_v2, ("numbers", 0, self.shape, self.shape, False, None)


class Describing(pickle.Pickler):
    def persistent_id(self, described: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", 1) if described == "numbers" else None


def test_a_pickle_is_refused_in_few_words_whatever_it_would_unfold_to(tmp_path: Path) -> None:
    """Tuples of tuples that are 2^60 words, sizes of 5,000 digits, more sizes than tensors have."""
    descriptions = [b"\x80\x02)" + b"2\x86" * 60 + b"Q."]
    for shape in ((10**5000,), (1,) * 100_000):
        written = io.BytesIO()
        Describing(written).dump({"weight": Placed(shape)})
        descriptions.append(written.getvalue())
    for description in descriptions:
        with pytest.raises(OffloadError) as caught:
            read_pickled(saved(tmp_path / "head.pt", description))
        assert len(str(caught.value)) < 1000


def test_names_that_unfold_without_end_are_refused_before_they_are_looked_up(tmp_path: Path) -> None:
    nested = b"K\x01" + b"2\x86" * 60  # a pair of itself twice, sixty times: 2^60 numbers
    for description in (
        b"\x80\x02}" + nested + b"K\x01s.",
        b"\x80\x02}(" + nested + b"K\x01u.",
        b"\x80\x02(" + nested + b"K\x01d.",
        b"\x80\x04\x8f(" + nested + b"\x90.",
        b"\x80\x04(" + nested + b"\x91.",
    ):
        with pytest.raises(OffloadError):
            read_pickled(saved(tmp_path / "head.pt", description))


def test_a_directory_that_claims_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """Any byte of its end: a record behind the file, a password, a later zip, a name in no encoding."""
    file, odd = tmp_path / "head.pt", tmp_path / "odd.pt"
    torch.save({"weight": torch.arange(12.0).view(3, 4)}, file)
    whole = file.read_bytes()
    for at in range(whole.rfind(b"PK\x01\x02"), len(whole)):
        odd.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            found = read_pickled(odd)
        except OffloadError:
            continue
        assert all(one.offset + one.nbytes <= len(whole) for one in found.values())


def test_a_head_that_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CorruptShard, match="not a regular file"):
        read_header(tmp_path / "medusa_lm_head.pt")
