"""Disks fail, files shrink, reads come back short: an error with file and layer, or the exact result."""

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.checkpoint.headers import open_folder
from offload.machine.files import SAFE, Files, Range
from tests.faults import Preadv, Views, read_ahead
from tests.held import open_below, started_since
from tests.tiny import LAYERS, greedy, logits_of, tiny

PROMPT = torch.arange(2, 14)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", tmp_path, max_shard_size="100KB")
    return tmp_path


def logits(model: PreTrainedModel) -> torch.Tensor:
    return logits_of(model, PROMPT)


def last_file_of_layer(folder: Path, layer: int) -> Path:
    entries = open_folder(folder).entries.values()
    return max(entry.file for entry in entries if entry.name.startswith(f"model.layers.{layer}."))


def in_use(folder: Path) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model that streams from disk and reads nothing until its next sweep, and its logits."""
    model = offload.load(folder, "disk")
    expected = logits(model)
    read_ahead(model)
    return model, expected


def test_short_reads_are_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(offload.load(folder, "none"))
    real: Preadv = os.preadv
    chance = random.Random(0)

    def short(fd: int, views: Views, offset: int) -> int:
        return real(fd, [views[0][: chance.randint(1, 3000)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    for tier in ("none", "ram", "disk"):
        assert torch.equal(logits(offload.load(folder, tier)), expected)


@pytest.mark.parametrize("dtype", ["as stored", "bf16"])
def test_random_delays_change_nothing(dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted on the way or not."""
    wanted = None if dtype == "as stored" else dtype
    expected = logits(offload.load(folder, "none", dtype=wanted))
    real: Preadv = os.preadv
    chance = random.Random(0)

    def late(fd: int, views: Views, offset: int) -> int:
        time.sleep(chance.random() / 500)
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", late)
    model = offload.load(folder, "disk", dtype=wanted)
    assert all(torch.equal(logits(model), expected) for _ in range(30))


def test_input_output_error_names_file_layer_and_offset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = in_use(folder)
    real: Preadv = os.preadv

    def broken(fd: int, views: Views, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    for _ in range(2):
        with pytest.raises(offload.ReadFailed, match=r"model-\S+\.safetensors at byte \d+ \(layer \d\).*errno 5"):
            logits(model)
    monkeypatch.setattr(os, "preadv", real)
    assert torch.equal(logits(model), expected)


def test_every_single_failed_read_is_an_error_or_exact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offload.load(folder, "disk")
    expected = logits(model)
    real: Preadv = os.preadv
    countdown = [0]

    def sometimes(fd: int, views: Views, offset: int) -> int:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return 0 if countdown[0] == -7 else real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", sometimes)
    failures: list[str] = []
    for nth in range(1, 20):
        read_ahead(model)  # the ring is full: the next read is one that the next sweep cannot do without
        countdown[0] = nth
        for _ in range(3):
            try:
                assert torch.equal(logits(model), expected)
            except offload.ReadFailed as error:
                failures.append(error.what)
    assert len(failures) > 4
    assert all("layer" in failure and ".safetensors" in failure for failure in failures)
    monkeypatch.setattr(os, "preadv", real)
    read_ahead(model)  # a read that is failing just now is the next sweep's error
    assert torch.equal(logits(model), expected)


def test_file_cut_short_during_use_stops_the_sweep_and_a_repaired_one_goes_on(folder: Path) -> None:
    model, expected = in_use(folder)
    file = last_file_of_layer(folder, LAYERS - 1)
    whole = file.read_bytes()
    os.truncate(file, len(whole) - 4000)
    with pytest.raises(offload.ReadFailed, match=rf"{file.name} at byte \d+ \(layer {LAYERS - 1}\)"):
        logits(model)
    with pytest.raises(offload.ReadFailed, match=f"bytes, it had {len(whole)} when loaded"):
        logits(model)
    file.write_bytes(whole)
    assert torch.equal(logits(model), expected)


def test_another_file_of_the_same_size_is_never_mixed_in(folder: Path) -> None:
    model, expected = in_use(folder)
    file = last_file_of_layer(folder, LAYERS - 1)
    other = bytearray(file.read_bytes())
    other[-1] ^= 1
    kept = file.with_suffix(".kept")
    os.link(file, kept)
    file.with_suffix(".new").write_bytes(other)
    os.replace(file.with_suffix(".new"), file)
    assert torch.equal(logits(model), expected)  # the open file is still the one that was loaded
    with kept.open("r+b") as same:
        same.write(other)
    for _ in range(2):
        with pytest.raises(offload.ReadFailed, match=rf"{file.name} at byte \d+ \(layer {LAYERS - 1}\).* written to"):
            logits(model)
    offload.stream_of(model).close()


def rewritten(file: Path, change: Callable[[bytearray], object]) -> None:
    """Written to in place, the time of the last write set back."""
    before, content = file.stat(), bytearray(file.read_bytes())
    change(content)
    with file.open("r+b") as same:
        same.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)


def test_a_file_written_to_in_place_is_noticed_though_its_time_was_set_back(folder: Path) -> None:
    model, expected = in_use(folder)
    file = last_file_of_layer(folder, LAYERS - 1)
    os.link(file, file.with_suffix(".other name"))
    file.chmod(0o600)
    assert torch.equal(logits(model), expected), "names and permissions are no content"
    read_ahead(model)
    rewritten(file, lambda content: content.__setitem__(-1, content[-1] ^ 1))
    for _ in range(2):
        with pytest.raises(offload.ReadFailed, match=rf"{file.name} at byte \d+ \(layer {LAYERS - 1}\).* written to"):
            logits(model)
    offload.stream_of(model).close()


def test_a_file_renamed_while_it_is_read_is_the_same_file(folder: Path) -> None:
    model, expected = in_use(folder)
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".away"))
    assert torch.equal(logits(model), expected)


def test_a_file_replaced_before_its_first_read_is_refused(folder: Path) -> None:
    file = last_file_of_layer(folder, LAYERS - 1)
    sizes = {file: file.stat().st_size}
    files = Files(sizes, SAFE)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    with pytest.raises(offload.ReadFailed, match="another file has taken its name"):
        files.read([Range(file, 0, (memoryview(bytearray(8)),))], "layer 0")
    files.close()


def test_file_that_vanished_and_came_back_is_opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = in_use(folder)
    files = list(folder.glob("*.safetensors"))
    for file in files:
        file.rename(file.with_suffix(".away"))
    real: Preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: 0)
    with pytest.raises(offload.ReadFailed, match="ends too early"):
        logits(model)
    monkeypatch.setattr(os, "preadv", real)
    with pytest.raises(offload.ReadFailed, match=r"No such file.*errno 2"):
        logits(model)
    for file in files:
        file.with_suffix(".away").rename(file)
    assert torch.equal(logits(model), expected)


def test_failure_in_the_middle_of_generate_leaves_the_model_usable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offload.load(folder, "disk")
    expected = greedy(model, PROMPT, 5)
    real: Preadv = os.preadv
    reads = [0]

    def later(fd: int, views: Views, offset: int) -> int:
        reads[0] += 1
        if reads[0] > 30:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", later)
    with pytest.raises(offload.ReadFailed):
        greedy(model, PROMPT, 50)
    monkeypatch.setattr(os, "preadv", real)
    assert torch.equal(greedy(model, PROMPT, 5), expected)


def test_failed_load_leaves_no_file_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: 0)
    with pytest.raises(offload.ReadFailed):
        offload.load(folder, "none")
    assert open_below(folder) == []


def test_a_model_is_collected_while_its_reader_is_stuck_and_closed_once_it_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collection happens on any thread and inside any lock: one that waited for a read could wait for itself."""
    before = set(threading.enumerate())
    model = offload.load(folder, "disk")
    readers = [thread for thread in started_since(before) if thread.name == "weights"]
    read_ahead(model)
    stream = offload.stream_of(model).stream
    real: Preadv = os.preadv
    reached, go_on = threading.Event(), threading.Event()

    def stuck(fd: int, views: Views, offset: int) -> int:
        reached.set()
        go_on.wait(60)
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", stuck)
    stream.take(0)
    stream.give()
    assert reached.wait(60)
    del model, stream
    gc.collect()
    assert any(reader.is_alive() for reader in readers), "collecting did not wait for the read"
    go_on.set()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
