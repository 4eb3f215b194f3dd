"""Experts come when they are chosen: the same numbers bit for bit, and only the bytes of those that were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from offload.checkpoint.block import Block
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.quantize import Quant
from offload.checkpoint.routing import Routing, Visits
from offload.errors import OffloadError
from offload.machine.files import PAGE_B
from offload.machine.speeds import Speeds
from offload.model.likely_experts import TOKENS, LikelyExperts
from offload.model.resident_layer import resident_layer
from offload.packs.pack import pack, plan
from offload.placement.forecast import ceilings, forecast
from offload.placement.placement import Offload
from offload.placement.quantized_sizes import work_of
from offload.stream.dequantized import DenseLayers
from offload.stream.slot import Slot, State
from offload.stream.store import Arena, DiskStore
from offload.stream.stream import LayerStream
from specexec.drafters.none import NoDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.faults import EACH_FAULT, fail_reads, reads_of_experts
from tests.tiny import LAYERS, VOCABULARY, logits_of, tiny
from tests.waiting import until
from tests.writing import prompt, sequence_of

EXPERTS, CHOSEN = 16, 2
FAMILIES = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
}
ROWS = [1, 7, 64]
ONE = torch.tensor([[7]])


def of_many(family: str, path: Path) -> PreTrainedModel:
    """A tiny mixture of more experts than a few rows visit."""
    make: Callable[..., PreTrainedModel] = tiny
    return make(family, path, **{FAMILIES[family]: EXPERTS})


def texts(rows: int) -> Iterator[torch.Tensor]:
    """A few sweeps, since the first layers of one are read before it is known how many rows it has."""
    generator = torch.Generator().manual_seed(rows)
    for _ in range(2):
        yield torch.randint(2, 250, (1, rows), generator=generator)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not read is not a number."""
    read = DiskStore.read

    def filled(self: DiskStore, layer: int, buffer: Arena | None, part: Block) -> torch.Tensor:
        assert buffer is not None
        if any(piece.parts[0].expert is None for piece in part.pieces):  # the first read of a layer
            buffer.flat.fill_(255)
        return read(self, layer, buffer, part)

    monkeypatch.setattr(DiskStore, "read", filled)


def visited(model: nn.Module, tokens: torch.Tensor) -> list[int]:
    """How many experts of each layer the rows are sent to, by a model that has all of them."""
    seen: list[int] = []

    def count(module: nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        seen.append(args[1].unique().numel())

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(count) for module in experts]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("poisoned")
def test_experts_on_demand_change_no_bit(family: str, tmp_path: Path) -> None:
    of_many(family, tmp_path)
    ways: list[tuple[Offload, torch.dtype]] = [
        ("ram", torch.float32),
        ("disk", torch.float32),
        ("disk", torch.bfloat16),
    ]
    for tier, dtype in ways:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        ours = offload.load(tmp_path, tier, dtype=dtype)
        for rows in ROWS:
            for tokens in texts(rows):
                assert torch.equal(logits_of(ours, tokens), logits_of(theirs, tokens)), (tier, dtype, rows)
        offload.stream_of(ours).close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_few_rows_bring_the_shared_part_and_the_experts_that_they_visit(
    family: str, tier: Offload, tmp_path: Path
) -> None:
    theirs = of_many(family, tmp_path)
    ours = offload.load(tmp_path, tier)
    stream = offload.stream_of(ours)
    layers = [dict(layer.named_parameters()) for layer in theirs.model.layers]
    experts_B = [sum(p.nbytes for name, p in held.items() if ".experts." in name) for held in layers]
    shared_B = stream.bytes_per_sweep - sum(experts_B)
    routed_B = [nbytes // EXPERTS for nbytes in experts_B if nbytes]
    for rows in ROWS:
        *_, tokens = texts(rows)
        logits_of(ours, tokens)  # the next one begins with layers that are read like this one's
        before_B = stream.stats().bytes_read
        logits_of(ours, tokens)
        found_B = stream.stats().bytes_read - before_B
        union = visited(theirs, tokens)
        expected_B = shared_B + sum(count * one_B for count, one_B in zip(union, routed_B, strict=True))
        # Before the large pieces of whole layers lie holes: two of them are experts.
        holes_B = 2 * PAGE_B * LAYERS
        assert min(routed_B) > holes_B
        # Of many rows some layers may come whole.
        assert expected_B - holes_B <= found_B <= (expected_B + holes_B if rows < 64 else stream.bytes_per_sweep)
        assert rows > 1 or union == [CHOSEN] * len(routed_B)
        if rows == 1:  # some may agree with each other more often than chance would have it
            assert found_B == pytest.approx(stream.bytes_per_sweep * float(stream.share(rows)), rel=0.02)
    stream.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_brings_no_more_experts_than_its_own_rows_visit(family: str, tmp_path: Path) -> None:
    """Rows come in tiles of sixteen; those that only fill a tile are sent nowhere else."""
    theirs = of_many(family, tmp_path)
    model = offload.load(tmp_path, "disk")
    stream, lm = offload.stream_of(model), TreeLM(model)
    layers = [dict(layer.named_parameters()) for layer in theirs.model.layers]
    experts_B = [sum(p.nbytes for name, p in held.items() if ".experts." in name) for held in layers]
    shared_B, one_B = stream.bytes_per_sweep - sum(experts_B), sum(experts_B) / EXPERTS
    for drafter, budget, most in ((NoDrafter(), 0, 1), (SiblingDrafter(TreeLM(theirs), VOCABULARY), 2, 3)):
        decoder = Decoder(lm, drafter, BestFirst(), budget)
        decoder.join(sequence_of(prompt(12), SamplingParams(max_tokens=24, temperature=0.0), limit=128))
        found_B = []
        while decoder.live:
            before = stream.stats()
            decoder.step()
            after = stream.stats()
            found_B.append(after.bytes_read - before.bytes_read - (after.wrong_B - before.wrong_B))
        steady_B = found_B[3:]  # until then layers come that were read while the prompt was
        assert len(steady_B) > 1
        assert max(steady_B) <= shared_B + most * CHOSEN * one_B + 64 * LAYERS
        assert most > 1 or min(steady_B) >= shared_B + CHOSEN * one_B - 64 * LAYERS
    lm.close()
    stream.close()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.usefixtures("poisoned")
def test_packed_experts_are_brought_and_unpacked_one_by_one(
    family: str, quant: Quant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_many(family, tmp_path / "dense")
    pack(plan(open_folder(tmp_path / "dense"), quant), tmp_path / "pack")
    with monkeypatch.context() as whole:
        for module in ("checkpoint.layout", "model.layer"):
            whole.setattr(f"offload.{module}.experts_of", lambda layer: None)
        reference = offload.load(tmp_path / "pack", "none")
        expected = [[logits_of(reference, tokens) for tokens in texts(rows)] for rows in ROWS]
    ours = offload.load(tmp_path / "pack", "disk")
    stream = offload.stream_of(ours)
    for rows, those in zip(ROWS, expected, strict=True):
        for tokens, logits in zip(texts(rows), those, strict=True):
            before_B = stream.stats().bytes_read
            assert isinstance(stream.stream, DenseLayers)
            stream.stream._scratch.fill_(255)
            assert torch.equal(logits_of(ours, tokens), logits), rows
        found_B = stream.stats().bytes_read - before_B
        assert found_B < stream.bytes_per_sweep * (0.5 if rows == 1 else 0.9) or rows == 64
    stream.close()


@pytest.fixture
def mixture(tmp_path: Path) -> Iterator[PreTrainedModel]:
    """One that streams from disk, in the middle of sweeps of one row."""
    of_many("qwen3_moe", tmp_path)
    model = offload.load(tmp_path, "disk")
    for _ in range(2):
        logits_of(model, ONE)
    yield model
    offload.stream_of(model).close()


@EACH_FAULT
def test_a_read_of_experts_that_fails_ends_the_sweep_and_the_next_one_is_right(
    fault: str, mixture: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits_of(mixture, ONE)
    with reads_of_experts(monkeypatch) as reading, monkeypatch.context() as faulty:
        fail_reads(faulty, fault, reading.is_set)
        with pytest.raises(OffloadError, match="ArithmeticError" if fault == "exception" else r"\(layer 0\)"):
            logits_of(mixture, ONE)
    for _ in range(2):
        assert torch.equal(logits_of(mixture, ONE), expected)


def test_an_interrupt_while_experts_are_on_their_way_loses_no_buffer(
    mixture: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, check = logits_of(mixture, ONE), LayerStream._check_readers

    def interrupted(self: LayerStream) -> None:
        if any(slot.wanted for slot in self._slots):
            raise KeyboardInterrupt
        check(self)

    for _ in range(5):
        with monkeypatch.context() as faulty:
            faulty.setattr(LayerStream, "_check_readers", interrupted)
            with pytest.raises(KeyboardInterrupt):
                logits_of(mixture, ONE)
        assert torch.equal(logits_of(mixture, ONE), expected)


def test_a_layer_that_is_taken_for_good_has_all_experts(tmp_path: Path) -> None:
    theirs = of_many("qwen3_moe", tmp_path)
    model = offload.load(tmp_path, "disk")
    for _ in range(2):
        logits_of(model, ONE)  # layers are read without their experts now
    held = dict(resident_layer(model, 1).named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in theirs.model.layers[1].named_parameters())
    offload.stream_of(model).close()


@given(st.integers(2, 256), st.integers(1, 8), st.integers(1, 512))
def test_more_rows_visit_more_experts_and_at_last_all_come_ahead(experts: int, chosen: int, rows: int) -> None:
    routing = Routing(experts, min(chosen, experts))
    shares = routing.share(np.arange(1, rows + 1))
    assert np.all(np.diff(shares) >= 0)
    assert shares[0] == pytest.approx(routing.chosen / experts) or not routing.on_demand(1)
    assert set(shares[~routing.on_demand(np.arange(1, rows + 1))]) <= {1.0}


@pytest.mark.parametrize("favourites", [0.0, 1.0, 2.0])
def test_how_many_experts_rows_visit_is_learned_from_sweeps(favourites: float) -> None:
    """Rows draw 4 of 64 experts, some of which are drawn more often than others: sizes in between are predicted."""
    rng, routing = np.random.default_rng(0), Routing(64, 4)
    chances_E = np.arange(1, 65) ** -favourites / np.sum(np.arange(1, 65) ** -favourites)

    def union(rows: int) -> int:
        chosen = [rng.choice(64, 4, replace=False, p=chances_E) for _ in range(rows)]
        return len(np.unique(chosen))

    visits = Visits(routing)
    for _ in range(50):
        for rows in (1, 8, 64):
            visits.learn(rows, union(rows))
    for rows in (4, 24, 48):
        true = np.mean([union(rows) for _ in range(50)])
        assert float(visits.routing.touched(rows)) == pytest.approx(true, rel=0.12)
        wrong = abs(float(routing.touched(rows)) - true)
        assert not favourites or abs(float(visits.routing.touched(rows)) - true) < wrong / 2


def test_guessed_experts_are_there_before_they_are_asked_for(mixture: PreTrainedModel) -> None:
    stream = offload.stream_of(mixture).stream
    assert isinstance(stream, LayerStream)
    for _ in range(2):  # from the second sweep on layers come without experts
        for layer in range(LAYERS):
            stream.take(layer, 1)
            stream.fetch([3])
            stream.give()
    stream.take(0, 1)
    stream.expect({0: [5, 9], 1: [2]})
    slots = {slot.layer: slot for slot in stream._slots}
    until(lambda: not {5, 9} & slots[0].missing and 2 not in slots[1].missing)
    read_B = stream.stats().bytes_read
    stream.fetch([5, 9])
    assert stream.stats().bytes_read == read_B
    stream.fetch([4])  # the guess was wrong: this one comes now
    assert stream.stats().bytes_read > read_B
    stream.give()
    assert 2 not in slots[1].missing
    assert slots[1].state is State.READY


@pytest.mark.usefixtures("poisoned")
def test_wrong_guesses_change_no_bit(tmp_path: Path) -> None:
    theirs = of_many("qwen3_moe", tmp_path)
    ours = offload.load(tmp_path, "disk")
    stream = offload.stream_of(ours).stream
    for seed in range(3):
        stream.expect({layer: [(layer + seed + at) % EXPERTS for at in range(4)] for layer in range(LAYERS)})
        for tokens in texts(1 + seed):
            assert torch.equal(logits_of(ours, tokens), logits_of(theirs, tokens))
    stream.close()


def test_tokens_say_which_experts_their_rows_are_likely_to_visit() -> None:
    likely, routing = LikelyExperts(), Routing(8, 2)
    for _ in range(2):
        likely.learn(3, [10, 11, 12], np.array([[0, 1], [2, 3], [0, 4], [0, 7]]), routing)  # the last row fills a tile
    likely.learn(3, [], np.array([[6, 7]]), routing)  # a piece that does nothing else
    assert likely.of([11]) == {3: [2, 3]}
    assert likely.of([99]) == {3: [0]}  # not seen: where most rows went
    assert likely.of([10, 11, 12])[3] == [0, 1, 2, 3, 4]
    for _ in range(40):  # rows of a token that go elsewhere every time say nothing
        likely.learn(3, [11], np.array([[4, 5]]), routing)
        likely.learn(3, [11], np.array([[6, 7]]), routing)
    assert likely.of([11]) == {3: []}
    for token in range(100, 100 + TOKENS):
        likely.learn(3, [token], np.array([[5, 6]]), routing)
    assert likely.of([11]) == {3: [5, 6]}  # forgotten
    assert len(likely._places) == TOKENS


def test_a_forecast_knows_that_few_rows_bring_few_experts(tmp_path: Path) -> None:
    of_many("qwen3_moe", tmp_path)
    folder = open_folder(tmp_path)
    model = offload.load(tmp_path, "disk")
    stream, work = offload.stream_of(model), work_of(folder, "none", 4)
    slow = replace(ceilings(Speeds(), "", "cpu", "f32"), disk_Bps=1e3)
    for rows in ROWS:
        told = forecast(stream.placement, work, slow, rows)
        assert told.disk_s * 1e3 == pytest.approx(stream.bytes_per_sweep * float(stream.share(rows)), rel=0.02)
        assert told.bound == "disk"
        assert (told.fetch_s == 0) == (rows == 64)
    stream.close()


def test_a_buffer_whose_experts_still_arrive_is_not_filled_by_another_reader(
    mixture: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, read_experts, check = logits_of(mixture, ONE), LayerStream._read_experts, LayerStream._check_readers
    fill, begun, go_on, filling = LayerStream._fill, Event(), Event(), set[int]()

    def slowly(self: LayerStream, slot: Slot, layer: int, wanted: frozenset[int]) -> None:
        filling.add(slot.number)
        begun.set()
        go_on.wait(60)
        filling.remove(slot.number)
        read_experts(self, slot, layer, wanted)

    def alone(self: LayerStream, slot: Slot, layer: int, part: Block) -> torch.Tensor:
        assert slot.number not in filling
        filling.add(slot.number)
        try:
            return fill(self, slot, layer, part)
        finally:
            filling.remove(slot.number)

    def interrupted(self: LayerStream) -> None:
        if begun.is_set():
            raise KeyboardInterrupt
        check(self)

    monkeypatch.setattr(LayerStream, "_fill", alone)
    with monkeypatch.context() as faulty:
        faulty.setattr(LayerStream, "_read_experts", slowly)
        faulty.setattr(LayerStream, "_check_readers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits_of(mixture, ONE)
    late = Timer(0.1, go_on.set)  # while the next sweep wants the buffer
    late.start()
    assert torch.equal(logits_of(mixture, ONE), expected)
    late.join()
