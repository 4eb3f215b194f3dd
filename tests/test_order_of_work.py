"""Copies, computation and readers are ordered whatever the timing: proven on a simulated device (tests/simulated)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import offload
from offload.machine import host_rows
from offload.machine.memory import Free
from offload.model import load
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.stream import stream, transfer
from offload.units import GiB
from specexec import SamplingParams
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.model import cache_in_ram
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Travel
from specexec.model.recurrent import travel
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.noise import Noise
from specexec.text.detokenizer import TextStream
from specexec.text.sequence import start
from tests.simulated.device import DEVICE, Simulator
from tests.simulated.mutants import Mutant, mutants
from tests.simulated.programs import Material, Plan
from tests.test_recurrent import built
from tests.tiny import VOCABULARY, tiny
from tests.writing import prompt, spell

SCHEDULES = 200
MUTANTS = [one for module in (transfer, host_rows, stream, cache_in_ram, travel) for one in mutants(module)]
TRIES = 40


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("experts"))


def wrong(material: Material, seed: int) -> str:
    """What is wrong with one run; nothing if all is well. Every second one has its copies land late."""
    plan, simulator = Plan.drawn(seed), Simulator(seed, late=seed % 4 > 1)
    with simulator:
        found = material.run(plan)
    if simulator.races:
        return simulator.races[0]
    expected = material.expected(plan.sweeps, plan.travels)
    return "" if found == expected else f"{found} instead of {expected}"


def test_no_two_accesses_race_in_two_hundred_schedules(material: Material) -> None:
    for seed in range(SCHEDULES):
        assert not (fault := wrong(material, seed)), (seed, Plan.drawn(seed), fault)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[one.name for one in MUTANTS])
def test_a_program_without_one_of_its_waits_is_noticed(material: Material, mutant: Mutant) -> None:
    with mutant.in_place():
        assert any(wrong(material, seed) for seed in range(TRIES)), mutant.line


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two layers each: dense; dense in four bits; with experts. And a hybrid of three, the first and last recurrent."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("dense", "few_bits", "experts", "hybrid")}
    tiny("llama", folders["dense"], num_hidden_layers=2)
    tiny("mixtral", folders["experts"], num_hidden_layers=2)
    built("qwen3_5_text").save_pretrained(folders["hybrid"])
    pack(plan(offload.open_folder(folders["dense"]), "nf4"), folders["few_bits"] / "pack")
    return folders | {"few_bits": folders["few_bits"] / "pack"}


@contextmanager
def loaded(folder: Path, tier: Offload, device: torch.device) -> Iterator[TreeLM]:
    """A model all of whose layers but the first keep in RAM what they keep, as is right for its device."""
    model = offload.load(folder, tier, str(device), "f32")
    lm = TreeLM(model, travel=Travel(frozenset([1, 2]), offload.carrier_for(device), with_states=True))
    try:
        yield lm
    finally:
        lm.close()
        offload.stream_of(model).close()


def written(folder: Path, tier: Offload, device: torch.device) -> list[int]:
    """A few tokens, drawn, with a drafter that guesses on while the target sweeps."""
    with loaded(folder, tier, device) as target, loaded(folder, "none", device) as drafter:
        sampling = SamplingParams(max_tokens=4, temperature=0.9, seed=3)
        guesses = SiblingDrafter(drafter, VOCABULARY, Ranking(shared_noise=False))
        decoder = Decoder(target, guesses, BestFirst(), 4, overlap=True)
        noise, text = Noise(3, VOCABULARY, device), TextStream(spell, ())
        sequence = start(prompt(8), sampling, noise, text, frozenset(), 512)
        decoder.join(sequence)
        while decoder.live:
            decoder.step()
        return sequence.tokens


@pytest.mark.parametrize(("name", "tier"), [("few_bits", "ram"), ("experts", "disk"), ("hybrid", "ram")])
def test_a_model_writes_the_same_text_on_a_device_whose_copies_are_late(
    models: dict[str, Path], name: str, tier: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "free_memory", lambda device, *_: Free(8 * GiB, None if device == "cpu" else 8 * GiB))
    expected = written(models[name], tier, torch.device("cpu"))
    with Simulator(seed=1, late=True) as simulator:
        assert written(models[name], tier, DEVICE) == expected
    assert simulator.races == []


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_a_drafter_on_the_cpu_guesses_for_a_target_elsewhere_as_it_would_beside_it(
    models: dict[str, Path], penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter is the target itself: with the same noise and the same penalties it is accepted whole."""
    monkeypatch.setattr(load, "free_memory", lambda device, *_: Free(8 * GiB, None if device == "cpu" else 8 * GiB))
    sampling = SamplingParams(max_tokens=8, temperature=0.9, seed=3, presence_penalty=penalty, top_p=0.9)
    cpu, found = torch.device("cpu"), list[tuple[list[int], int]]()

    def run(device: torch.device) -> None:
        with loaded(models["dense"], "ram", device) as target, loaded(models["dense"], "none", cpu) as drafter:
            decoder = Decoder(target, SiblingDrafter(drafter, VOCABULARY), BestFirst(), 4, overlap=True)
            noise, text = Noise(3, VOCABULARY, device), TextStream(spell, ())
            sequence = start(prompt(8), sampling, noise, text, frozenset(), 512)
            decoder.join(sequence)
            sweeps = 0
            while decoder.live:
                decoder.step()
                sweeps += 1
            found.append((sequence.answer, sweeps))

    run(cpu)
    with Simulator(seed=1, late=True) as simulator:
        run(DEVICE)
    assert simulator.races == []
    assert found[0] == found[1]
    assert found[0][1] < 6


def test_a_sweep_can_be_cancelled_at_any_layer_while_copies_are_on_their_way(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "free_memory", lambda device, *_: Free(8 * GiB, None if device == "cpu" else 8 * GiB))
    text, ended = prompt(6), set[bool]()

    def hidden(device: torch.device, cancel: bool) -> torch.Tensor:
        with loaded(models["dense"], "disk", device) as lm:
            cache = KVCache()
            lm.forward([Rows.text(cache, text)])
            cache.commit(range(6))
            for number in range(3 if cancel else 0):
                sweep = lm.begin([Rows(cache, [number, 7], [-1, 0])])
                for _ in range(number):  # gives the sweep a turn
                    torch.ones(1, device=device)
                sweep.cancel()
                with offload.stream_of(lm.model).unwaited():
                    sweep.wait()
                ended.add(sweep._future.exception() is None)
                cache.forget_nodes()
            return lm.forward([Rows(cache, [3, 7], [-1, 0])])[0].cpu()

    expected = hidden(torch.device("cpu"), cancel=False)
    for seed in range(2):
        with Simulator(seed, late=seed == 1, switches=0.2) as simulator:
            assert torch.equal(hidden(DEVICE, cancel=True), expected)
        assert simulator.races == []
    assert False in ended, "no sweep was cancelled"


def test_no_layer_waits_for_the_device_in_the_middle_of_a_sweep(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "free_memory", lambda device, *_: Free(8 * GiB, None if device == "cpu" else 8 * GiB))
    with Simulator() as simulator, loaded(models["few_bits"], "disk", DEVICE) as lm:
        cache = KVCache()
        for _ in range(2):
            simulator.waits.clear()
            lm.forward([Rows(cache, [5, 6, 7], [-1, 0, 0])])
            cache.forget_nodes()
        # Before the first layer: tokens and their places go to the device, and ids come back to be looked up in RAM.
        assert {place.rpartition(".")[0] for place in simulator.waits} == {
            "copy in specexec.model.sweep_rows",
            "copy in offload.model.load",
        }
        assert simulator.waits.total() == 6
