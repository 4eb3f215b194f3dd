"""Placement: what was promised fits, what does not fit is refused with both numbers, and memory is as placed."""

import re
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offload
from offload.errors import NoGpu, NotEnoughRam, NotEnoughVram, OffloadError
from offload.hardware import free_memory, free_ram
from offload.placement import RING, Free, GiB, Need, Offload, Placement, place, size
from offload.store import Arena
from tests.tiny import tiny

MiB = 1 << 20
# A 70B model at 4.5 bits on a PC, in round numbers.
BIG = Need(
    layers_B=(480 * MiB,) * 80,
    disk_B=80 * 470 * MiB,
    embeddings_B=GiB,
    norms_B=MiB,
    head_B=GiB,
    cache_B=2 * GiB,
    ctx=8192,
)

sizes = st.integers(0, 4 * GiB)
needs = st.builds(
    Need,
    layers_B=st.lists(st.integers(1, GiB), min_size=1, max_size=8).map(tuple),
    disk_B=sizes,
    embeddings_B=sizes,
    norms_B=sizes,
    head_B=sizes,
    cache_B=sizes,
    ctx=st.integers(1, 1 << 20),
    scratch_B=sizes,
    extra_B=sizes,
)
frees = st.builds(Free, ram_B=st.integers(0, 32 * GiB), vram_B=st.none() | st.integers(0, 32 * GiB))
choices: st.SearchStrategy[Offload] = st.sampled_from(["auto", "none", "ram", "disk"])


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
    assert choice in ("auto", placement.offload)


@given(needs, frees)
def test_auto_is_the_first_tier_that_fits(need: Need, free: Free) -> None:
    single = [attempt(need, free, choice) for choice in ("none", "ram", "disk")]
    fitting = [placement for placement in single if isinstance(placement, Placement)]
    outcome = attempt(need, free, "auto")
    assert outcome == fitting[0] if fitting else isinstance(outcome, OffloadError)


@given(needs, frees, st.integers(0, 8 * GiB))
def test_more_memory_never_slows_down(need: Need, free: Free, more_B: int) -> None:
    order = ["none", "ram", "disk"]
    more = Free(free.ram_B + more_B, None if free.vram_B is None else free.vram_B + more_B)
    before, after = attempt(need, free, "auto"), attempt(need, more, "auto")
    if isinstance(before, Placement):
        assert isinstance(after, Placement)
        assert order.index(after.offload) <= order.index(before.offload)


def test_a_70b_finds_its_place_on_a_gpu_of_8_gigabytes() -> None:
    from_ram = place(BIG, Free(64 * GiB, 8 * GiB))
    from_disk = place(BIG, Free(16 * GiB, 8 * GiB))
    assert from_ram.summary == "ram: 80 layers stream from RAM, 37.5 GiB per sweep, ring 3 × 0.47 GiB"
    assert from_disk.summary == "disk: 80 layers stream from SSD, 36.7 GiB per sweep, ring 3 × 0.47 GiB"
    assert from_disk.host_B == 3 * 480 * MiB
    assert from_disk.device_B == 4 * GiB + MiB + 3 * 480 * MiB
    assert place(BIG, Free(16 * GiB, 48 * GiB)).summary == "none: all 80 layers stay in GPU memory, 37.5 GiB"


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
    assert vram.value.what == "--offload disk needs 4.9 GiB of GPU memory, 3.0 GiB are free."
    assert vram.value.why == (
        "layer buffers 0.94 GiB · embeddings 1.0 GiB · head 1.0 GiB · KV cache at --ctx 8192 2.0 GiB"
    )


@pytest.mark.parametrize(
    ("nbytes", "words"), [(0, "0 B"), (99, "99 B"), (2048, "2.0 KiB"), (MiB, "1.0 MiB"), (GiB // 4, "0.25 GiB")]
)
def test_sizes_are_for_people(nbytes: int, words: str) -> None:
    assert size(nbytes) == words


def test_budget_of_the_user_decides(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    need = offload.stream_of(offload.load(tmp_path, "none", ctx=64)).placement.need
    resident_B = need.fixed_B + sum(need.layers_B) + need.scratch_B
    assert offload.stream_of(offload.load(tmp_path, ctx=64, ram_B=resident_B)).placement.offload == "none"
    assert offload.stream_of(offload.load(tmp_path, ctx=64, ram_B=resident_B - 1)).placement.offload == "disk"
    with pytest.raises(NotEnoughRam, match=r"--offload disk needs .* of RAM, 1\.0 KiB are free \(limit: --ram"):
        offload.load(tmp_path, ctx=64, ram_B=1024)


def test_extra_memory_of_the_caller_counts(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    with pytest.raises(NotEnoughRam, match="needs 1000000"):
        offload.load(tmp_path, extra_B=10**6 * GiB)


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
    weights_B = placement.ring_B if tier == "disk" else sum(placement.need.layers_B)
    assert streaming_B <= weights_B + placement.need.scratch_B + 1 < placement.host_B
    if tier == "disk":
        assert streaming_B >= weights_B


def test_resident_memory_of_a_streamed_model_is_ring_and_rest(tmp_path: Path) -> None:
    tiny("llama", tmp_path, hidden_size=512, intermediate_size=1536, num_hidden_layers=24, head_dim=128)
    tokens = torch.arange(9)[None]
    warm_up = tmp_path / "small"
    tiny("llama", warm_up)
    with torch.no_grad():
        offload.load(warm_up, "disk")(tokens)
        process = psutil.Process()
        before_B = process.memory_info().rss
        model = offload.load(tmp_path, "disk", ctx=64)
        for _ in range(2):
            model(tokens)
        grown_B = process.memory_info().rss - before_B
    placement = offload.stream_of(model).placement
    assert sum(placement.need.layers_B) > 200 * MiB
    # Half of a resident model would already break this; allocator noise does not.
    assert grown_B < placement.host_B + 48 * MiB < 100 * MiB


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
