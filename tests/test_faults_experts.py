"""Disks fail while chosen experts are on their way: the error says where, and the answer goes on exactly.

Everything goes through `specexec.load` and a running decode with guesses, on mixtures as downloaded and as packs.
Faults are put below the loop that checks reads, and only while experts are fetched.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload
import specexec
from offload.checkpoint.headers import open_folder
from offload.hub.names import demo_folder
from offload.packs.pack import pack, plan
from offload.stream.slot import Slot
from offload.stream.stream import LayerStream
from specexec.engine.engine import Engine
from specexec.model.cache import KVCache
from tests.faults import (
    EACH_FAULT,
    Views,
    check_fails,
    check_goes_on,
    fail_reads,
    from_the,
    read_on,
    reader_of,
    reads_of_experts,
    slow_reads,
)
from tests.tiny import tiny

PROMPT = "List the days of the week."
SAMPLING = specexec.SamplingParams(max_tokens=16, temperature=0.8, seed=7, ignore_eos=True)
EXPERTS = 16


def mixture(kind: str, folder: Path) -> Path:
    """A random mixture with the built-in tokenizer: qwen3_moe as it would be downloaded, mixtral as a pack."""
    family, count = {"checkpoint": ("qwen3_moe", "num_experts"), "pack": ("mixtral", "num_local_experts")}[kind]
    tokenizer = demo_folder("target")
    tiny(family, folder / "whole", vocab_size=4096, **{count: EXPERTS})  # type: ignore[arg-type]  # an override
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder / "whole" / file)
    if kind == "checkpoint":
        return folder / "whole"
    pack(plan(open_folder(folder / "whole"), "nf4"), folder / "pack")
    return folder / "pack"


def load(folder: Path) -> Engine:
    """Its own drafter, so that sweeps have several rows."""
    return specexec.load(str(folder), drafter=str(folder), offload="disk", ctx=256, budget=3)


@pytest.fixture(scope="module", params=["checkpoint", "pack"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(whole: Path) -> tuple[int, ...]:
    with load(whole) as undisturbed:
        return undisturbed.generate(PROMPT, SAMPLING).tokens


@pytest.fixture(scope="module")
def engine(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One for all faults: it has to survive each of them."""
    folder = tmp_path_factory.mktemp("engine") / "model"
    shutil.copytree(whole, folder)
    with load(folder) as found:
        yield found


def begun(engine: Engine, caches: dict[object, KVCache]) -> tuple[Iterator[specexec.Burst], list[int]]:
    """An answer after two sweeps: layers are read without their experts by now."""
    bursts = engine.stream(PROMPT, SAMPLING, caches)
    return bursts, [*next(bursts).tokens, *next(bursts).tokens]


@EACH_FAULT
@pytest.mark.parametrize("nth", [1, 6])
def test_a_read_of_experts_that_fails_ends_the_sweep_and_the_answer_goes_on_exactly(
    fault: str, nth: int, engine: Engine, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: dict[object, KVCache] = {}
    bursts, written = begun(engine, caches)
    due = from_the(nth)
    with reads_of_experts(monkeypatch) as now, monkeypatch.context() as faulty:
        fail_reads(faulty, fault, lambda: now.is_set() and due())
        check_fails(fault, bursts, written)
    check_goes_on(engine, (PROMPT, SAMPLING), written, caches, expected)


def test_short_and_late_reads_of_experts_change_nothing(
    engine: Engine, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_reads(monkeypatch)
    assert engine.generate(PROMPT, SAMPLING).tokens == expected


@pytest.mark.parametrize("when", ["before the read", "in the middle of it"])
def test_a_file_that_is_cut_short_while_its_experts_are_read_is_named(
    when: str, engine: Engine, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, real = reader_of(engine._model), os.preadv
    caches: dict[object, KVCache] = {}
    bursts, written = begun(engine, caches)
    cut: dict[Path, bytes] = {}

    def shorten() -> None:
        layer = next(slot.layer for slot in stream._slots if slot.reading and slot.layer is not None)
        file = stream._blocks[layer].pieces[0].parts[0].entry.file
        cut.setdefault(file, file.read_bytes())
        os.truncate(file, 4096)

    with reads_of_experts(monkeypatch) as now, monkeypatch.context() as faulty:
        if when == "before the read":
            reads = LayerStream._read_experts

            def shortened(self: LayerStream, slot: Slot, layer: int, wanted: frozenset[int]) -> None:
                shorten()
                reads(self, slot, layer, wanted)

            faulty.setattr(LayerStream, "_read_experts", shortened)
        else:

            def preadv(fd: int, views: Views, offset: int) -> int:
                if now.is_set():
                    shorten()
                return real(fd, views, offset)

            faulty.setattr(os, "preadv", preadv)
        with pytest.raises(offload.ReadFailed, match=r"\.safetensors.*\(layer \d\)"):
            read_on(bursts, written)
    for file, content in cut.items():
        file.write_bytes(content)
    check_goes_on(engine, (PROMPT, SAMPLING), written, caches, expected)


def test_a_reader_that_dies_while_experts_are_awaited_is_noticed(
    engine: Engine, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: dict[object, KVCache] = {}
    bursts, written = begun(engine, caches)
    stream = reader_of(engine._model)
    gone, silent, alive = threading.Thread(target=lambda: None), threading.Event(), stream._readers
    gone.start()
    gone.join()

    def dying(self: LayerStream, slot: Slot, layer: int, wanted: frozenset[int]) -> None:
        self._readers = [*alive, gone]
        silent.wait(60)
        slot.reading = False

    with monkeypatch.context() as patched:
        patched.setattr(LayerStream, "_read_experts", dying)
        with pytest.raises(offload.ReadFailed, match="the reader of weights has died"):
            read_on(bursts, written)
        assert not silent.is_set(), "noticed, not waited for"
    stream._readers = alive
    silent.set()
    check_goes_on(engine, (PROMPT, SAMPLING), written, caches, expected)
