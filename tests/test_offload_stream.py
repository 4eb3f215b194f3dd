"""The ring: in order, ahead, never stale, as slow as it is told, and back on its feet after any failure."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import offload
from offload.checkpoint.block import Block, TensorPart
from offload.errors import NotEnoughRam, NotEnoughVram, ReadFailed
from offload.stream.protocol import StreamStats
from offload.stream.store import Arena
from offload.stream.stream import LayerStream
from offload.stream.transfer import LinkLimit
from tests.tiny import LAYERS, tiny
from tests.waiting import until

LAYER_B = 256
COUNT = 5


class NumberStore:
    """Every byte of layer i is i; what else happens in a read is up to the test."""

    def __init__(self, before: Callable[[int], None] = lambda layer: None) -> None:
        self.before = before
        self.reads: list[int] = []

    def read(self, layer: int, buffer: Arena | None, part: Block) -> torch.Tensor:
        self.reads.append(layer)
        self.before(layer)
        assert buffer is not None
        buffer.flat.fill_(layer)
        return buffer.flat

    def moved_B(self, layer: int, part: Block) -> int:
        return LAYER_B

    def close(self) -> None:
        self.reads.clear()


BLOCKS = tuple(Block(f"layer {i}", (TensorPart("w", torch.uint8, (LAYER_B,), 0, ()),)) for i in range(COUNT))


@pytest.fixture
def streams() -> Iterator[Callable[[NumberStore], LayerStream]]:
    opened: list[LayerStream] = []

    def open_stream(store: NumberStore, ring: int = 2) -> LayerStream:
        opened.append(LayerStream(BLOCKS, store, [Arena(LAYER_B) for _ in range(ring)]))
        return opened[-1]

    yield open_stream
    for stream in opened:
        stream.close()


def nearly(reads: list[int], wanted: list[int]) -> bool:
    """In order, but that two readers which begin at once may change places."""
    in_place = all(layer in reads[max(at - 1, 0) : at + 2] for at, layer in enumerate(wanted))
    return in_place and sorted(reads) == sorted(wanted)


def sweep(stream: LayerStream) -> list[int]:
    found = []
    for layer in range(COUNT):
        tensor = stream.take(layer)["w"]
        assert bool((tensor == tensor[0]).all())
        found.append(int(tensor[0]))
        stream.give()
    return found


def test_sweeps_see_every_layer_in_order(streams: Callable[[NumberStore], LayerStream]) -> None:
    stream = streams(NumberStore())
    assert [sweep(stream) for _ in range(3)] == [list(range(COUNT))] * 3


def test_reads_run_ahead_into_the_next_sweep(streams: Callable[..., LayerStream]) -> None:
    store = NumberStore()
    stream = streams(store)
    until(lambda: nearly(store.reads, [0, 1]))
    sweep(stream)
    until(lambda: nearly(store.reads, [0, 1, 2, 3, 4, 0, 1]))


def test_one_buffer_is_filled_in_order(streams: Callable[..., LayerStream]) -> None:
    store = NumberStore()
    stream = streams(store, ring=1)
    until(lambda: store.reads == [0])
    sweep(stream)
    until(lambda: store.reads == [0, 1, 2, 3, 4, 0])


def test_the_next_layer_is_asked_for_while_one_arrives(streams: Callable[[NumberStore], LayerStream]) -> None:
    asked = {layer: threading.Event() for layer in range(COUNT)}

    def arrive(layer: int) -> None:
        asked[layer].set()
        assert asked[(layer + 1) % COUNT].wait(60), "the disk pauses between two layers"

    stream = streams(NumberStore(arrive))
    assert sweep(stream) == list(range(COUNT))


@pytest.mark.parametrize("fault", [False, True])
def test_a_layer_that_arrives_before_its_turn_waits_for_it(
    fault: bool, streams: Callable[[NumberStore], LayerStream]
) -> None:
    """If it fails, those before it compute nevertheless."""
    arrived = threading.Event()

    def overtake(layer: int) -> None:
        if layer == 2:
            assert arrived.wait(60)
        elif layer == 3:
            arrived.set()
            if fault:
                raise offload.ReadFailed("could not read layer 3")

    stream = streams(NumberStore(overtake))
    for layer in range(3):
        assert int(stream.take(layer)["w"][0]) == layer
    if fault:
        with pytest.raises(offload.ReadFailed, match="layer 3"):
            stream.take(3)
    else:
        assert [int(stream.take(layer)["w"][0]) for layer in (3, 4)] == [3, 4]


def test_what_is_read_for_an_abandoned_sweep_is_never_computed_with(streams: Callable[..., LayerStream]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def late(layer: int) -> None:
        if layer == 3:
            begun.set()
            go_on.wait(60)

    stream = streams(NumberStore(late), ring=3)
    for layer in range(2):
        stream.take(layer)
    assert begun.wait(60)  # layer 2 is there or on its way too
    finisher = threading.Timer(0.05, go_on.set)
    finisher.start()
    assert sweep(stream) == list(range(COUNT))
    finisher.join()
    until(lambda: stream.stats().dropped_B == 2 * LAYER_B)
    assert stream.stats().bytes_read == (2 + COUNT) * LAYER_B


def test_bytes_read_are_sweeps_times_bytes_per_sweep(streams: Callable[[NumberStore], LayerStream]) -> None:
    stream = streams(NumberStore())
    for _ in range(3):
        sweep(stream)
    stats = stream.stats()
    assert stats.bytes_read == 3 * stream.bytes_per_sweep == 3 * COUNT * LAYER_B
    assert (stats.layers_read, stats.dropped_B) == (3 * COUNT, 0)


def test_abandoned_sweep_drops_its_buffers_and_begins_anew(streams: Callable[[NumberStore], LayerStream]) -> None:
    store = NumberStore()
    stream = streams(store)
    for layer in range(3):
        stream.take(layer)
    until(lambda: len(store.reads) >= 4)
    assert sweep(stream) == list(range(COUNT))
    assert stream.stats().dropped_B > 0
    assert stream.stats().bytes_read == (3 + COUNT) * LAYER_B


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_any_order_gives_the_layer_that_was_asked_for(ring: int, streams: Callable[..., LayerStream]) -> None:
    chance = random.Random(ring)
    stream = streams(NumberStore(lambda layer: time.sleep(chance.random() / 2000)), ring=ring)
    for _ in range(300):
        layer = chance.choice([0, 1, 2, 3, 4, *[(stream.position or 0) + 1] * 5]) % COUNT
        tensor = stream.take(layer)["w"]
        time.sleep(chance.random() / 2000)
        assert bool((tensor == layer).all())
        if chance.random() < 0.8:
            stream.give()


def test_buffer_with_the_wrong_tag_never_computes(streams: Callable[[NumberStore], LayerStream]) -> None:
    store = NumberStore()
    stream = streams(store)
    until(lambda: len(stream._in(stream._slots[0].state.READY)) == 2)
    stream._slots[0].layer = 3
    with pytest.raises(offload.ReadFailed, match=r"hold the layers \[3, 1\], layer 0 was asked for"):
        stream.take(0)


def test_position_is_the_layer_that_computes(streams: Callable[[NumberStore], LayerStream]) -> None:
    stream = streams(NumberStore())
    assert stream.position is None
    stream.take(0)
    assert stream.position == 0
    stream.give()
    assert stream.position is None


def test_failure_stops_the_sweep_within_a_second_and_the_next_one_works(
    streams: Callable[[NumberStore], LayerStream],
) -> None:
    broken = threading.Event()
    broken.set()

    def fail(layer: int) -> None:
        if layer == 3 and broken.is_set():
            raise offload.ReadFailed("could not read layer 3")

    stream = streams(NumberStore(fail))
    took_s = []
    for _ in range(5):
        started_s = time.monotonic()
        with pytest.raises(offload.ReadFailed, match="layer 3"):
            sweep(stream)
        took_s.append(time.monotonic() - started_s)
    assert min(took_s) < 1, "a busy machine may delay some of them"
    broken.clear()
    assert sweep(stream) == list(range(COUNT))


def test_failure_of_reading_ahead_is_forgotten_if_the_sweep_can_read(
    streams: Callable[[NumberStore], LayerStream],
) -> None:
    broken = threading.Event()

    def fail(layer: int) -> None:
        if broken.is_set():
            raise offload.ReadFailed("the disk is away")

    broken.set()
    stream = streams(NumberStore(fail))
    until(lambda: all(slot.failure for slot in stream._slots))
    broken.clear()
    assert sweep(stream) == list(range(COUNT))


@pytest.mark.parametrize(
    ("error", "seen", "words"),
    [
        (SystemExit(1), offload.ReadFailed, "SystemExit"),
        (ValueError("odd"), offload.ReadFailed, "ValueError"),
        (MemoryError(), NotEnoughRam, "memory ran out while the next layers were read"),
        (torch.OutOfMemoryError("tried 2 GiB"), NotEnoughVram, "GPU memory ran out while the next layers were read"),
    ],
)
def test_any_end_of_the_reader_reaches_the_computation(
    error: BaseException,
    seen: type[Exception],
    words: str,
    streams: Callable[[NumberStore], LayerStream],
) -> None:
    def fail(layer: int) -> None:
        if layer == 2:
            raise error

    stream = streams(NumberStore(fail))
    with pytest.raises(seen, match=words):
        sweep(stream)


def test_a_waiting_thread_can_be_released_from_a_slow_layer() -> None:
    stream = LayerStream(BLOCKS, NumberStore(), [Arena(LAYER_B)], limit_Bps=1.0)
    failures: list[BaseException] = []

    def waiting() -> None:
        try:
            stream.take(0)
        except ReadFailed as failure:
            failures.append(failure)

    thread = threading.Thread(target=waiting)
    thread.start()
    with stream.unwaited():
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert "did not want to wait" in str(failures[0])
    stream.close()


def test_interrupt_in_the_middle_of_a_layer_loses_no_buffer(streams: Callable[[NumberStore], LayerStream]) -> None:
    stream = streams(NumberStore())
    for _ in range(5):
        stream.take(0)  # and the computation is interrupted before it gives the layer back
    assert sweep(stream) == list(range(COUNT))


def test_close_ends_the_thread_even_while_it_waits() -> None:
    stream = LayerStream(BLOCKS, NumberStore(), [Arena(LAYER_B)], limit_Bps=1.0)
    stream.close()
    assert not any(reader.is_alive() for reader in stream._readers)


def test_link_limit_holds_each_layer_back() -> None:
    now = [100.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += seconds

    limit = LinkLimit(1000.0, clock=lambda: now[0], sleep=sleep)
    limit.hold(500, started_s=100.0)  # half a second of wire, and nothing else took time
    now[0] += 0.2
    limit.hold(500, started_s=100.5)  # the disk took 0.2 s of it
    now[0] += 10
    limit.hold(500, started_s=110.0)  # this read took longer than the wire
    limit.hold(1000, started_s=110.7)  # idle time is not saved up
    assert slept == [0.5, 0.3, 0.7]
    LinkLimit(None, sleep=sleep).hold(10**12, 0.0)
    assert len(slept) == 3


def test_readers_share_the_link_that_is_limited() -> None:
    started_s = time.monotonic()
    stream = LayerStream(BLOCKS, NumberStore(), [Arena(LAYER_B) for _ in range(3)], limit_Bps=50 * LAYER_B)
    for _ in range(2):
        sweep(stream)
    stream.close()
    assert time.monotonic() - started_s >= 0.99 * 2 * COUNT / 50, "two readers are no second link"


def test_statistics_are_a_snapshot() -> None:
    assert StreamStats() == StreamStats(layers_read=0, bytes_read=0, dropped_B=0, wait_s=0.0, read_s=0.0)


@pytest.mark.parametrize("tier", ["none", "ram", "disk"])
def test_a_model_counts_its_sweeps(tier: offload.Offload, tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, tier)
    stream = offload.stream_of(model)
    with torch.no_grad():
        for _ in range(3):
            model(torch.arange(5)[None])
    assert stream.layers == LAYERS
    assert stream.stats().layers_read == 3 * LAYERS
    assert stream.stats().bytes_read == 3 * stream.bytes_per_sweep
    assert stream.bytes_per_sweep == stream.placement.stream_B
    assert (stream.bytes_per_sweep == 0) == (tier == "none")


def test_a_link_limit_without_a_link_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny("llama", tmp_path)
    offload.load(tmp_path, "disk", link_limit_Bps=1e9)
    assert not caplog.records
    offload.load(tmp_path, "none", link_limit_Bps=1e9)
    assert "the link limit has no effect" in caplog.text
