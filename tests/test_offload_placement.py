"""Placement: what was promised fits, what does not fit is refused with both numbers, and memory is as placed."""

import itertools
import re
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offload
from offload.errors import NoGpu, NotEnoughRam, NotEnoughVram, OffloadError
from offload.machine.memory import Free, free_memory, free_ram
from offload.placement.forecast import ASSUMED_GPU, Ceilings, Work, forecast
from offload.placement.placement import RING, Need, Offload, Placement
from offload.placement.solver import place, spread
from offload.stream.store import Arena
from offload.units import GiB, size
from tests.held import added_by_every
from tests.tiny import tiny

MiB = 1 << 20
# A 70B model at 4.5 bits on a PC, in round numbers.
BIG = Need(
    layers_B=(480 * MiB,) * 80,
    read_B=(470 * MiB,) * 80,
    embeddings_B=GiB,
    norms_B=MiB,
    head_B=GiB,
    cache_B=2 * GiB,
    ctx=8192,
)
SMALL = replace(BIG, layers_B=(MiB,) * 7, read_B=(MiB,) * 7)

sizes = st.integers(0, 4 * GiB)
states = st.dictionaries(st.integers(0, 11), sizes)


@st.composite
def _needs(draw: st.DrawFn, alike: bool = False) -> Need:
    layers_B = draw(st.lists(st.integers(1, GiB), min_size=1, max_size=12))
    if alike:
        layers_B = layers_B[:1] * len(layers_B)
    return Need(
        layers_B=tuple(layers_B),
        read_B=tuple(size_B // 2 + 1 for size_B in layers_B),
        embeddings_B=draw(sizes),
        norms_B=draw(sizes),
        head_B=draw(sizes),
        cache_B=draw(sizes),
        ctx=draw(st.integers(1, 1 << 20)),
        guesses_B=draw(sizes),
        states_B=dict.fromkeys(range(len(layers_B)), draw(sizes)) if alike else draw(states),
        cache_moves=draw(st.booleans()),
        scratch_B=draw(sizes),
        beside_B={"trees": draw(sizes)},
    )


needs = _needs()
frees = st.builds(
    Free,
    ram_B=st.integers(0, 48 * GiB),
    vram_B=st.none() | st.integers(0, 48 * GiB),
    ram_margin_B=st.integers(0, GiB),
    vram_margin_B=st.integers(0, GiB),
    ram_given=st.booleans(),
    disk_Bps=st.floats(1e8, 1e11),
    link_Bps=st.floats(1e8, 1e11),
)
choices: st.SearchStrategy[Offload] = st.sampled_from(["auto", "none", "ram", "disk"])


def moving_s(placement: Placement, free: Free) -> float:
    return max(placement.disk_B / free.disk_Bps, placement.link_B / free.link_Bps)


def sweep_s(placement: Placement, free: Free) -> float:
    """What `plan` predicts of it."""
    ceilings = Ceilings(free.disk_Bps, free.link_Bps, ASSUMED_GPU, {})
    return forecast(placement, Work(sum(placement.need.layers_B), 2), ceilings, 64).sweep_s


def attempt(need: Need, free: Free, choice: Offload) -> Placement | OffloadError:
    try:
        return place(need, free, choice)
    except (NotEnoughRam, NotEnoughVram) as refusal:
        return refusal


@given(needs, frees, choices)
def test_it_fits_or_is_refused_with_both_numbers(need: Need, free: Free, choice: Offload) -> None:
    outcome = attempt(need, free, choice)
    if isinstance(outcome, OffloadError):
        assert len(re.findall(r"\d+(\.\d+)? (B|[KMG]iB)", outcome.what)) >= 2, outcome.what
        assert outcome.hint
        return
    placement = outcome
    assert placement.host_B <= free.ram_B
    assert (placement.device_B is None) == (free.vram_B is None)
    if placement.device_B is not None and free.vram_B is not None:
        assert placement.device_B <= free.vram_B
    assert len(placement.tiers) == len(need.layers_B)
    assert 0 <= placement.ring <= min(RING, len(need.layers_B))
    order = ["none", "ram", "disk", "auto"]
    assert order.index(placement.offload) <= order.index(choice), "never slower than was asked for"


@given(needs, frees, choices)
def test_the_bill_is_what_lies_where(need: Need, free: Free, choice: Offload) -> None:
    placement = attempt(need, free, choice)
    if isinstance(placement, OffloadError):
        return
    tiers = list(zip(need.layers_B, placement.tiers, strict=True))
    on_device = sum(size_B for size_B, tier in tiers if tier == "device")
    in_ram = sum(size_B for size_B, tier in tiers if tier == "ram")
    ring_B = placement.ring * need.widest_B
    host_ring_B = ring_B if "disk" in placement.tiers else 0
    keys_B = need.cache_B + need.guesses_B
    fixed_B = need.resident_B - sum(need.layers_B) - keys_B - sum(need.states_B.values())
    travelling = placement.caches.count("ram")
    in_ram_B = (need.states_B.get(layer, 0) for layer, tier in enumerate(placement.caches) if tier == "ram")
    states_B = sorted(in_ram_B)
    assert travelling == 0 or need.cache_moves
    if placement.device_B is None:
        kept_B = keys_B + sum(need.states_B.values())
        assert placement.host_B == fixed_B + kept_B + need.scratch_B + on_device + in_ram + host_ring_B
        assert {"disk", "ram"} - set(placement.tiers), "RAM is the CPU's own memory"
        assert not travelling
    else:
        # Token ids are looked up in RAM, unless the matrix is the head too; a layer's keys may pass through two places.
        away_B = need.embeddings_B if need.head_B else 0
        keys_in_ram_B = sum(-(-part_B * travelling // len(tiers)) for part_B in (need.cache_B, need.guesses_B))
        passing_B = min(2, travelling) * need.caches_B[0] + sum(states_B[-3:])
        kept_B = keys_B - keys_in_ram_B + sum(need.states_B.values()) - sum(states_B)
        assert placement.device_B == fixed_B - away_B + kept_B + passing_B + on_device + ring_B
        assert placement.host_B >= need.scratch_B + in_ram + host_ring_B + away_B + keys_in_ram_B + sum(states_B)
        moving = [size_B for size_B, tier in tiers if tier != "device"]
        assert placement.link_B == sum(moving) + travelling * need.caches_B[0] + sum(states_B)
    assert (placement.ring == 0) == (on_device + in_ram * (placement.device_B is None) == sum(need.layers_B))


@given(needs, frees)
def test_auto_finds_a_place_wherever_there_is_one_and_streams_least(need: Need, free: Free) -> None:
    found = attempt(need, free, "auto")
    by_name = [attempt(need, free, choice) for choice in ("none", "ram", "disk")]
    if isinstance(found, OffloadError):
        assert isinstance(by_name[2], OffloadError)
        return
    # Within the margins a mode named by the user may do better: it takes what auto leaves free.
    roomy = replace(free, ram_margin_B=0, vram_margin_B=0, ram_given=True)
    best = attempt(need, roomy, "auto")
    assert isinstance(best, Placement)
    for placement in by_name:
        if isinstance(placement, Placement):
            assert moving_s(best, free) <= moving_s(placement, free)


@given(_needs(alike=True), frees, st.integers(0, 8 * GiB), st.integers(0, 8 * GiB), choices)
def test_more_memory_never_slows_down(
    need: Need, free: Free, more_ram_B: int, more_vram_B: int, choice: Offload
) -> None:
    more = replace(
        free,
        ram_B=free.ram_B + more_ram_B,
        vram_B=None if free.vram_B is None else free.vram_B + more_vram_B,
    )
    before, after = attempt(need, free, choice), attempt(need, more, choice)
    if isinstance(before, Placement):
        assert isinstance(after, Placement)
        assert sweep_s(after, more) <= sweep_s(before, free)


def test_slow_and_fast_layers_alternate() -> None:
    both: list[Offload] = ["ram", "disk"]
    for choice, vram_GiB in itertools.product(both, (6, 12, 24, 36)):
        tiers = place(BIG, Free(64 * GiB, vram_GiB * GiB), choice).tiers
        runs = [(tier == "device", len([*run])) for tier, run in itertools.groupby(tiers)]
        for stays in (True, False):
            lengths = [length for kind, length in runs[1:-1] if kind == stays]
            assert max(lengths) - min(lengths) <= 1, (choice, vram_GiB)
    # Keys and values that travel are spread the same way.
    caches = place(replace(BIG, cache_moves=True), Free(64 * GiB, 40 * GiB), "none").caches
    kept = [layer for layer, tier in enumerate(caches) if tier == "device"]
    assert {after - before for before, after in pairwise(kept)} <= {1, 2}
    assert 0 < caches.count("ram") < 40


@given(frees)
def test_without_a_budget_disk_keeps_nothing_in_ram(free: Free) -> None:
    placement = attempt(SMALL, replace(free, ram_given=False, vram_B=None), "disk")
    if isinstance(placement, Placement):
        assert set(placement.tiers) == {"disk"}


@given(st.lists(st.integers(1, 1), min_size=1, max_size=200), st.integers(0, 200))
def test_what_stays_is_spread_evenly(sizes_B: list[int], budget_B: int) -> None:
    kept = spread(sizes_B, budget_B)
    assert len(kept) == min(budget_B, len(sizes_B))
    assert kept == sorted(set(kept))
    for group in (kept, sorted(set(range(len(sizes_B))) - set(kept))):
        gaps = [after - before for before, after in pairwise(group)]
        if gaps:
            assert max(gaps) - min(gaps) <= 1
            round_the_corner = group[0] + len(sizes_B) - group[-1]
            assert round_the_corner <= max(gaps) + 1


def test_a_70b_finds_its_place_on_a_gpu_of_8_gigabytes() -> None:
    from_ram = place(BIG, Free(64 * GiB, 8 * GiB))
    from_disk = place(BIG, Free(16 * GiB, 8 * GiB), "disk")
    mixed = place(BIG, Free(16 * GiB, 8 * GiB))
    assert from_ram.summary == (
        "ram: 73 layers stream from RAM, 34.2 GiB per sweep; 7 stay in GPU memory, 3.3 GiB, ring 3 × 0.47 GiB"
    )
    assert from_disk.summary == (
        "disk: 73 layers stream from SSD, 33.5 GiB per sweep; 7 stay in GPU memory, 3.3 GiB, ring 3 × 0.47 GiB"
    )
    assert mixed.summary == (
        "disk: 44 layers stream from SSD, 20.2 GiB per sweep; 29 stream from RAM, 13.6 GiB per sweep; "
        "7 stay in GPU memory, 3.3 GiB, ring 3 × 0.47 GiB"
    )
    assert from_disk.host_B == GiB + 3 * 480 * MiB
    assert from_disk.device_B == 3 * GiB + MiB + (3 + 7) * 480 * MiB
    assert (mixed.stream_B, mixed.link_B) == (44 * 470 * MiB + 29 * 480 * MiB, 73 * 480 * MiB)
    assert place(BIG, Free(16 * GiB, 48 * GiB)).summary == "all 80 layers stay in GPU memory, 37.5 GiB"


def test_a_budget_of_ram_is_filled_on_the_cpu() -> None:
    free = Free(24 * GiB, ram_margin_B=GiB)
    assert place(BIG, free, "disk").summary == "disk: 80 layers stream from SSD, 36.7 GiB per sweep, ring 3 × 0.47 GiB"
    for placement in (place(BIG, free), place(BIG, Free(23 * GiB, ram_given=True), "disk")):
        assert placement.summary == (
            "disk: 43 layers stream from SSD, 19.7 GiB per sweep; 37 stay in RAM, 17.3 GiB, ring 3 × 0.47 GiB"
        )
        assert placement.host_B <= 23 * GiB


def test_nothing_is_read_from_disk_where_all_fits_within_the_margins() -> None:
    """A mix that fills the margin of the GPU too is refused; the mix that is found instead must not read the disk."""
    roomy = place(BIG, Free(64 * GiB, 7 * GiB), "ram")
    free = Free(roomy.host_B + GiB, 8 * GiB, ram_margin_B=GiB, vram_margin_B=GiB)
    found = place(BIG, free)
    assert found.tiers == roomy.tiers
    assert found.disk_B == 0
    assert found.host_B == free.ram_B - free.ram_margin_B
    assert found.device_B is not None
    assert found.device_B <= 7 * GiB


def test_the_margin_is_taken_before_a_model_is_refused() -> None:
    least_B = place(BIG, Free(64 * GiB), "disk").host_B
    free = Free(least_B, ram_margin_B=GiB)
    assert set(place(BIG, free).tiers) == {"disk"}


def test_a_tight_budget_takes_a_smaller_ring_before_it_is_refused() -> None:
    tight_B = 4 * GiB + MiB + 2 * 480 * MiB
    assert place(BIG, Free(tight_B), "disk").ring == 2
    with pytest.raises(NotEnoughRam):
        place(BIG, Free(tight_B - 1), "disk")


def test_refusals_read_like_the_rest_of_the_program() -> None:
    with pytest.raises(NotEnoughRam) as ram:
        place(BIG, Free(int(21.7 * GiB), ram_limit="container 24 GiB"), "ram")
    assert ram.value.what == "--offload ram needs 41.5 GiB of RAM, 21.7 GiB are free (limit: container 24 GiB)."
    assert ram.value.hint == "--offload disk, or close other programs."
    with pytest.raises(NotEnoughVram) as vram:
        place(BIG, Free(64 * GiB, 3 * GiB), "disk")
    assert vram.value.what == "--offload disk needs 3.9 GiB of GPU memory, 3.0 GiB are free."
    assert vram.value.why == "layer buffers 0.94 GiB · norms 1.0 MiB · head 1.0 GiB · KV cache at --ctx 8192 2.0 GiB"


def test_keys_and_values_leave_the_gpu_before_a_model_is_refused() -> None:
    moves = replace(BIG, cache_moves=True, guesses_B=GiB)
    placement = place(moves, Free(64 * GiB, 3 * GiB), "ram")
    assert placement.summary == (
        "ram: 79 layers stream from RAM, 37.0 GiB per sweep; 1 stay in GPU memory, 0.47 GiB, ring 3 × 0.47 GiB; "
        "KV of 79 layers in RAM, up to 3.0 GiB per sweep"
    )
    assert placement.link_B == 79 * (480 * MiB + moves.caches_B[0])
    with pytest.raises(NotEnoughRam, match=r"KV cache at --ctx 8192 2\.0 GiB"):
        place(moves, Free(3 * GiB, 3 * GiB), "disk")


def test_tied_embeddings_are_on_the_gpu_once() -> None:
    tied = replace(BIG, head_B=0)
    placement = place(tied, Free(64 * GiB, 8 * GiB), "ram")
    assert placement.device_parts_B["embeddings"] == GiB
    assert "embeddings" not in placement.host_parts_B
    assert place(BIG, Free(64 * GiB, 8 * GiB), "ram").host_parts_B["embeddings"] == GiB


@pytest.mark.parametrize(
    ("nbytes", "words"), [(0, "0 B"), (99, "99 B"), (2048, "2.0 KiB"), (MiB, "1.0 MiB"), (GiB // 4, "0.25 GiB")]
)
def test_sizes_are_for_people(nbytes: int, words: str) -> None:
    assert size(nbytes) == words


def test_budget_of_the_user_decides(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    need = offload.stream_of(offload.load(tmp_path, "none", ctx=64)).placement.need
    resident_B = need.resident_B + need.scratch_B
    assert offload.stream_of(offload.load(tmp_path, ctx=64, ram_B=resident_B)).placement.offload == "none"
    tight = offload.stream_of(offload.load(tmp_path, ctx=64, ram_B=resident_B - 1)).placement
    assert set(tight.tiers) == {"disk"}, "of four layers three buffers hold nearly all"
    with pytest.raises(NotEnoughRam, match=r"--offload disk needs .* of RAM, 1\.0 KiB are free \(limit: --ram 1\."):
        offload.load(tmp_path, ctx=64, ram_B=1024)


def test_extra_memory_of_the_caller_counts(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    with pytest.raises(NotEnoughRam, match=r"needs 1000000[^·]*RAM(.|\n)*drafter 1000000"):
        offload.load(tmp_path, beside_B={"drafter": 10**6 * GiB})


@pytest.mark.parametrize("tier", ["none", "ram", "disk"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_buffers_are_as_large_as_placed(
    tier: Offload, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("mixtral", tmp_path)
    living: weakref.WeakSet[Arena] = weakref.WeakSet()
    create = Arena.__init__

    def counted(arena: Arena, size_B: int) -> None:
        create(arena, size_B)
        living.add(arena)

    monkeypatch.setattr(Arena, "__init__", counted)
    model = offload.load(tmp_path, tier, dtype=dtype)
    with torch.no_grad():
        for _ in range(3):
            model(torch.arange(9)[None])
    placement = offload.stream_of(model).placement
    streaming_B = sum(arena.flat.nbytes for arena in living)
    weights_B = placement.ring_B if tier == "disk" else placement.kept_B("device") + placement.kept_B("ram")
    assert streaming_B <= weights_B + placement.need.scratch_B + 1 < placement.host_B
    if tier == "disk":
        assert streaming_B >= weights_B


def test_resident_memory_of_a_streamed_model_is_ring_and_rest(deep: Path) -> None:
    tokens = torch.arange(9)[None]
    models = []

    def use() -> None:
        models.append(offload.load(deep / "m", "disk", ctx=64))
        for _ in range(2):
            models[-1](tokens)

    with torch.no_grad():
        grown_B = added_by_every(use, 2).memory_B
    placement = offload.stream_of(models[0]).placement
    assert sum(placement.need.layers_B) > 200 * MiB
    # Half of a resident model would already break this; allocator noise does not.
    assert grown_B < placement.host_B + 40 * MiB < 100 * MiB


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def test_limits_of_containers_count(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/a/b\n5:memory:/c\n3:cpu:/d\n")
    nothing = free_ram(tmp_path / "none", own)
    assert nothing.limit == ""
    assert nothing.free_B == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    v2 = tmp_path / "v2"
    write(v2 / "a/b/memory.max", "max\n")
    write(v2 / "a/memory.max", f"{64 * MiB}\n")
    write(v2 / "a/memory.current", f"{30 * MiB}\n")
    write(v2 / "a/memory.stat", f"anon 1\ninactive_file {10 * MiB}\n")
    assert (free_ram(v2, own).free_B, free_ram(v2, own).limit) == (44 * MiB, "container 64.0 MiB")
    v1 = tmp_path / "v1"
    write(v1 / "memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    write(v1 / "memory/memory.usage_in_bytes", "1")
    write(v1 / "memory/c/memory.limit_in_bytes", str(32 * MiB))
    write(v1 / "memory/c/memory.usage_in_bytes", str(40 * MiB))
    assert free_ram(v1, own).free_B == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(NoGpu, match="--device cuda was asked for, but PyTorch"):
        free_memory("cuda")
