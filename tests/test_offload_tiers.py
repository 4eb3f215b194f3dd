"""Any mix of tiers computes the same bits, reads what stays once, and streams only the rest."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.checkpoint.block import Block
from offload.errors import NotEnoughRam
from offload.machine.memory import Free
from offload.model import load as models
from offload.placement.placement import KVHome, Need, Placement, Tier
from offload.placement.solver import place
from offload.stream.store import Arena, DiskStore
from tests.tiny import greedy, logits_of, tiny

PROMPT = torch.arange(2, 32)[None]
LAYERS = 8
TIERS: tuple[Tier, ...] = ("device", "ram", "disk")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", tmp_path, num_hidden_layers=LAYERS, max_shard_size="300KB")
    return tmp_path


def load_as(folder: Path, tiers: list[Tier], patch: pytest.MonkeyPatch, dtype: str = "f32") -> PreTrainedModel:
    """Load with every layer where it is told to be, as only a GPU would have it otherwise."""

    def told(need: Need, free: Free, choice: str, kv: KVHome) -> Placement:
        travelling = len(tiers) - tiers.count("device")
        return replace(place(need, free, "disk"), tiers=tuple(tiers), ring=min(3, travelling))

    with patch.context() as while_loading:
        while_loading.setattr(models, "place", told)
        return offload.load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_any_mix_of_tiers_gives_the_same_bits(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = offload.load(folder, "none", dtype=dtype)
    expected, text = logits_of(resident, PROMPT), greedy(resident, PROMPT, 6)
    chance = random.Random(0)
    for _ in range(6):
        tiers = [chance.choice(TIERS) for _ in range(LAYERS)]
        model = load_as(folder, tiers, monkeypatch, dtype)
        assert all(torch.equal(logits_of(model, PROMPT), expected) for _ in range(2)), tiers
        assert torch.equal(greedy(model, PROMPT, 6), text), tiers
        offload.stream_of(model).close()


def test_a_budget_decides_how_many_layers_stay(folder: Path) -> None:
    expected = logits_of(offload.load(folder, "none"), PROMPT)
    least = offload.stream_of(offload.load(folder, "disk", ctx=64)).placement
    for stay in (0, 1, 2, 4):
        model = offload.load(folder, "disk", ctx=64, ram_B=least.host_B + stay * least.need.widest_B)
        stream = offload.stream_of(model)
        assert stream.placement.count("device") == stay
        assert torch.equal(logits_of(model, PROMPT), expected)
        assert stream.bytes_per_sweep == stream.placement.stream_B == sum(least.need.read_B[stay:])
        assert (stream.stats().layers_read, stream.stats().bytes_read) == (LAYERS, stream.bytes_per_sweep)
        stream.close()
    enough = offload.load(folder, "disk", ctx=64, ram_B=2 * least.host_B + sum(least.need.layers_B))
    assert offload.stream_of(enough).placement.offload == "none", "nothing is read twice that there is room for"


def test_what_stays_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_block = DiskStore.read_block

    def counted(store: DiskStore, block: Block, buffer: Arena) -> None:
        read.append(block.label)
        read_block(store, block, buffer)

    monkeypatch.setattr(DiskStore, "read_block", counted)
    tiers: list[Tier] = ["device", "disk", "ram", "disk", "disk", "device", "disk", "ram"]
    model = load_as(folder, tiers, monkeypatch)
    for _ in range(4):
        logits_of(model, PROMPT)
    offload.stream_of(model).close()
    for layer, tier in enumerate(tiers):
        times = read.count(f"layer {layer}")
        assert times == 1 if tier != "disk" else times in (4, 5), (layer, tier)


def test_without_a_layer_on_disk_no_file_stays_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers: list[Tier] = ["device", "ram"] * (LAYERS // 2)
    model = load_as(folder, tiers, monkeypatch)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert torch.isfinite(logits_of(model, PROMPT)).all()


def test_an_abandoned_sweep_over_a_mix_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers: list[Tier] = ["device", "disk", "disk", "device", "disk", "disk", "device", "disk"]
    model = load_as(folder, tiers, monkeypatch)
    expected = logits_of(model, PROMPT)
    stream = offload.stream_of(model).stream
    chance = random.Random(1)
    for _ in range(20):
        for layer in range(chance.randint(1, LAYERS)):
            assert stream.take(layer)
            assert stream.position == layer
            if chance.random() < 0.7:
                stream.give()
        assert torch.equal(logits_of(model, PROMPT), expected)


def test_memory_refused_while_loading_is_said_with_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Arena.__init__
    made: list[int] = []

    def scarce(arena: Arena, size_B: int) -> None:
        made.append(size_B)
        if size_B and len(made) > 8:  # closing the disk leaves an arena of nothing
            raise MemoryError
        create(arena, size_B)

    monkeypatch.setattr(Arena, "__init__", scarce)
    with pytest.raises(NotEnoughRam, match=r"memory ran out while loading; the plan was .* of RAM"):
        offload.load(folder, "ram")


def test_loading_tells_how_far_it_is(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    offload.load(folder, "ram", on_layer_read=lambda read, of: heard.append((read, of)))
    assert heard == [(read, LAYERS) for read in range(1, LAYERS + 1)]
