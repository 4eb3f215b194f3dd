"""Disks, memory and threads fail while an answer is being written: the error says where, and the text goes on exactly.

Everything goes through `specexec.load` and a running decode, with guesses and with layers that stream from disk; faults
are put below the loop that checks reads.
"""

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import offload
import specexec
from offload.checkpoint.headers import open_folder
from offload.errors import CorruptShard, NotEnoughRam, OffloadError
from offload.hub.names import demo_folder
from offload.packs.pack import pack, plan
from specexec.engine.engine import Engine
from specexec.errors import BrokenLogits
from specexec.model.cache import KVCache
from tests.faults import EACH_FAULT, check_fails, check_goes_on, fail_reads, from_the, read_ahead, slow_reads
from tests.held import added_by_every

PROMPT = "List the days of the week."
SAMPLING = specexec.SamplingParams(max_tokens=24, temperature=0.8, seed=7, ignore_eos=True)
LAYER = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in target as a pack: a file for each layer, a hash for each file."""
    folder = tmp_path_factory.mktemp("packed") / "target"
    pack(plan(open_folder(demo_folder("target")), "none"), folder)
    return folder


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "target")
    return tmp_path / "target"


def load(folder: Path, *, verify: bool = False, drafter: str = str(demo_folder("drafter"))) -> Engine:
    return specexec.load(str(folder), drafter=drafter, offload="disk", ctx=256, budget=8, verify=verify)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with load(folder) as found:
        yield found


@pytest.fixture(scope="module")
def expected(packed: Path) -> tuple[int, ...]:
    with load(packed) as undisturbed:
        return undisturbed.generate(PROMPT, SAMPLING).tokens


@EACH_FAULT
@pytest.mark.parametrize("nth", [1, 9])
def test_a_read_that_fails_ends_the_sweep_and_the_answer_goes_on_exactly(
    fault: str, nth: int, engine: Engine, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: dict[object, KVCache] = {}
    bursts = engine.stream(PROMPT, SAMPLING, caches)
    written = list(next(bursts).tokens)
    read_ahead(engine._model)
    with monkeypatch.context() as faulty:
        fail_reads(faulty, fault, from_the(nth))
        check_fails(fault, bursts, written)
    check_goes_on(engine, (PROMPT, SAMPLING), written, caches, expected)


def test_short_and_late_reads_change_nothing(
    engine: Engine, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_reads(monkeypatch)
    assert engine.generate(PROMPT, SAMPLING).tokens == expected


@pytest.mark.parametrize("harm", ["truncated", "replaced", "vanished"])
def test_a_file_that_changes_while_it_is_read_is_named(harm: str, engine: Engine, expected: tuple[int, ...]) -> None:
    file = engine.folders["target"] / "layer-00003.safetensors"
    whole = file.read_bytes()
    bursts = engine.stream(PROMPT, SAMPLING)
    next(bursts)
    read_ahead(engine._model)
    if harm == "truncated":
        os.truncate(file, len(whole) // 2)
    else:
        file.unlink()
        if harm == "replaced":  # the open one is still the old one, so it takes a failure or a new start to see it
            file.write_bytes(whole[:-64])
        stream = offload.stream_of(engine._model).stream
        stream._store._disk._files._forget(file)  # type: ignore[attr-defined]  # as after any failure
    with pytest.raises(offload.ReadFailed, match=r"layer-00003\.safetensors.*\(layer 3\)"):
        list(bursts)
    file.write_bytes(whole)
    assert engine.generate(PROMPT, SAMPLING).tokens == expected


def test_a_dead_reader_is_noticed(engine: Engine) -> None:
    bursts = engine.stream(PROMPT, SAMPLING)
    next(bursts)
    stream = offload.stream_of(engine._model).stream
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()
    silent = threading.Event()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream, "_readers", [gone])
        patched.setattr(stream, "_fill", lambda *_: silent.wait(60) and {})
        with pytest.raises(offload.ReadFailed, match="the reader of weights has died"):
            list(bursts)
        assert not silent.is_set(), "noticed, not waited for"
        silent.set()


def test_refused_memory_ends_the_answer_and_the_next_one_is_whole(
    engine: Engine, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = offload.skeleton_layer(engine._model, 3)

    def greedy(rows: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 55)

    with monkeypatch.context() as scarce:
        scarce.setattr(inner.mlp, "forward", greedy)
        with pytest.raises(NotEnoughRam, match="memory ran out while layer 3 computed"):
            engine.generate(PROMPT, SAMPLING)
    assert engine.generate(PROMPT, SAMPLING).tokens == expected


def harmed(folder: Path, harm: Callable[[torch.Tensor], None]) -> str:
    """One weight of layer 2 is changed on disk; sizes and headers stay right."""
    file = folder / "layer-00002.safetensors"
    entry = open_folder(folder).entries[LAYER]
    content = bytearray(file.read_bytes())
    weight = torch.frombuffer(content, dtype=torch.bfloat16, count=entry.nbytes // 2, offset=entry.offset)
    harm(weight)
    file.write_bytes(content)
    return file.name


def flip_a_bit(weight: torch.Tensor) -> None:
    weight.view(torch.int16)[5] ^= 1 << 14


def zero_a_block(weight: torch.Tensor) -> None:
    weight[:2000] = 0


def write_nan(weight: torch.Tensor) -> None:
    weight[0] = torch.nan


@pytest.mark.parametrize("harm", [flip_a_bit, zero_a_block, write_nan])
def test_damaged_bytes_are_found_by_hash_before_anything_is_loaded(
    harm: Callable[[torch.Tensor], None], folder: Path
) -> None:
    with load(folder, verify=True) as sound:
        assert sound.generate(PROMPT, SAMPLING).tokens
    name = harmed(folder, harm)
    with pytest.raises(CorruptShard, match=f"1 file of .*{name}"):
        load(folder, verify=True)


def test_shards_that_changed_places_are_no_model(folder: Path) -> None:
    one, other = folder / "layer-00001.safetensors", folder / "layer-00002.safetensors"
    one.rename(folder / "away")
    other.rename(one)
    (folder / "away").rename(other)
    with pytest.raises(CorruptShard, match=r"layer-0000\d\.safetensors lacks the tensor"):
        load(folder)


def test_weights_that_are_not_numbers_never_become_text(folder: Path) -> None:
    harmed(folder, write_nan)
    with load(folder) as engine, pytest.raises(BrokenLogits, match="not finite"):
        engine.generate(PROMPT, SAMPLING)


def test_an_index_that_leads_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    index = folder / "model.safetensors.index.json"
    shutil.copy(folder / "layer-00002.safetensors", tmp_path / "outside.safetensors")
    index.write_text(index.read_text().replace("layer-00002.safetensors", "../outside.safetensors"))
    with pytest.raises(OffloadError, match=r"outside|index"):
        load(folder)


def test_two_hundred_aborted_sweeps_give_everything_back(
    folder: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, short = load(folder, drafter="none"), replace(SAMPLING, max_tokens=3)  # drafting is not what is aborted
    chance = random.Random(0)
    faulty, left = [False], [0]

    def due() -> bool:
        """One read of each answer fails, or the answer is stopped while it is read (by a thread that reads)."""
        left[0] -= 1
        if left[0] == 0 and not faulty[0]:
            engine.stop()
        return left[0] == 0 and faulty[0]

    fail_reads(monkeypatch, "EIO", due)

    aborted = 0

    def abort() -> None:
        nonlocal aborted
        for number in range(50):
            faulty[0], left[0] = number % 2 == 0, chance.randint(1, 12)
            try:
                aborted += engine.generate(PROMPT, short).finish_reason == "interrupted"
            except offload.ReadFailed:
                aborted += 1
        left[0] = 0

    added = added_by_every(abort)
    assert aborted > 120, "most are aborted; others ended before the read that was to fail"
    assert engine.generate(PROMPT, SAMPLING).tokens == expected
    engine.close()
    assert max(added.files, added.threads) <= 0
    assert added.tensors < 8
