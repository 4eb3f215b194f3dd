"""Keys and values that live in RAM change no token and no bit. A CPU plays the GPU where there is none."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

import offload
import specexec
from offload.machine import host_rows as carrier
from offload.machine import memory as hardware
from offload.machine.host_rows import DeviceCarrier, HostCarrier
from offload.machine.memory import Free
from offload.model import load as model
from offload.units import GiB
from specexec import SamplingParams
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.errors import SweepCancelled
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Pairs, Travel
from specexec.model.tree_lm import Rows, TreeLM
from specexec.text.sequence import Sequence
from tests.test_offload_wire import StandIn
from tests.tiny import LAYERS, VOCABULARY, logits_of, tiny
from tests.writing import prompt, write

FAMILIES = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]
SOME = frozenset([0, 1, 3])
PROMPTS = [prompt(20), prompt(250, 2)]


class Late(HostCarrier):
    """Copies happen at the last moment that is allowed: as late as on a GPU."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.moved_B = 0

    def copy(self, pairs: Pairs) -> None:
        self.receive()  # copies keep their order
        self.waiting = list(pairs)

    def receive(self) -> None:
        for target, source in self.waiting:
            assert target.is_contiguous(), "one run of bytes"
            assert source.is_contiguous()
            target.copy_(source)
            self.moved_B += source.nbytes
        self.waiting = []

    def settle(self) -> None:
        self.receive()


def written(target: TreeLM, sampling: SamplingParams) -> list[Sequence]:
    drafter = SiblingDrafter(TreeLM(target.model), VOCABULARY, Ranking(shared_noise=False))
    return write(target, drafter, PROMPTS, sampling, 16, overlap=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_rows_are_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    whole = tiny(family, tmp_path / "m")
    carrying = Late()
    here, away = TreeLM(whole), TreeLM(whole, travel=Travel(SOME, carrying))
    sampling = SamplingParams(max_tokens=10, temperature=0.9, seed=3)
    at_home = written(here, sampling)
    travelled = written(away, sampling)
    assert carrying.moved_B > 0
    for one, other in zip(at_home, travelled, strict=True):
        assert one.tokens == other.tokens
        rows, same = one.caches[here], other.caches[away]
        assert len(rows) == len(same) > 20
        for layer in range(LAYERS):
            for ours, theirs in rows.layers[layer].runs(same.layers[layer], 0, len(rows)):
                assert torch.equal(ours, theirs), layer


def test_a_window_brings_only_what_it_shows(tmp_path: Path) -> None:
    whole = tiny("mistral", tmp_path / "m")
    carrying = Late()
    lm, cache = TreeLM(whole, travel=Travel(frozenset(range(LAYERS)), carrying)), KVCache()
    lm.forward([Rows(cache, prompt(300), range(-1, 299))])
    cache.commit(range(300))
    carrying.moved_B = 0
    lm.forward([Rows(cache, [7], [-1])])
    row_B = 2 * 2 * 16 * 4  # keys and values of two heads of 16 floats
    assert carrying.moved_B == LAYERS * row_B * (8 - 1 + 1), "seven rows down, one up"


def test_a_cancelled_sweep_leaves_nothing_moving_and_the_text_as_it_was(tmp_path: Path) -> None:
    whole = tiny("llama", tmp_path / "m")
    carrying = Late()
    lm, cache = TreeLM(whole, travel=Travel(frozenset(range(LAYERS)), carrying)), KVCache()
    plain, same = TreeLM(whole), KVCache()
    text = prompt(40)
    for one, rows in ((lm, cache), (plain, same)):
        one.forward([Rows(rows, text[:30], range(-1, 29))])
        rows.commit(range(30))
    attend = lm.model.model.layers[2].self_attn.forward

    def cancelled(*_: object, **__: object) -> None:
        raise SweepCancelled

    lm.model.model.layers[2].self_attn.forward = cancelled
    with pytest.raises(SweepCancelled):
        lm.forward([Rows(cache, text[30:], range(-1, 9))])
    assert not carrying.waiting
    assert (len(cache), cache.parents) == (30, [])
    lm.model.model.layers[2].self_attn.forward = attend
    (expected,) = plain.forward([Rows(same, text[30:], range(-1, 9))])
    (found,) = lm.forward([Rows(cache, text[30:], range(-1, 9))])
    assert torch.equal(found, expected)


def test_beginnings_and_rewound_texts_travel_too(tmp_path: Path) -> None:
    whole = tiny("qwen3", tmp_path / "m")
    lm, cache = TreeLM(whole, travel=Travel(frozenset(range(LAYERS)), Late())), KVCache()
    plain, same = TreeLM(whole), KVCache()
    text = prompt(60)
    found = []
    for one, rows in ((lm, cache), (plain, same)):
        one.forward([Rows(rows, text, [-1, *range(29), 9, *range(30, 59)])])  # two branches after the tenth
        rows.commit([*range(10), *range(30, 40)], keep=[40, 41])
        one.forward([Rows(rows, [5, 6], [1, -1])])
        rows.commit([0, 1, 2])
        branch = rows.prefix(18)
        rows.rewind(12)
        found.append(one.forward([Rows(rows, text[:9], range(-1, 8)), Rows(branch, text[20:25], range(-1, 4))]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return playing_gpu(monkeypatch)


def playing_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CPU that plays a GPU with as much memory as the list says."""
    vram_B = [8 * GiB]

    def free(device: str, ram_B: int | None = None, vram: int | None = None) -> Free:
        return Free(ram_B or 8 * GiB, vram or vram_B[0])

    monkeypatch.setattr(hardware, "free_memory", free)
    monkeypatch.setattr(model, "free_memory", free)
    return vram_B


def test_what_does_not_fit_a_gpu_is_kept_in_ram_and_the_text_stays(small_gpu: list[int]) -> None:
    texts: set[str] = set()
    placements = []
    for _ in range(2):
        with specexec.load(drafter="sibling", offload="ram", budget=32, ctx=1024, dtype="f32") as llm:
            texts.add(llm.generate("The import statement", SamplingParams(max_tokens=30, seed=1)).text)
            both = [*llm.generate_many(["A list is", "The for loop"], SamplingParams(max_tokens=8, seed=2))]
            texts.add("|".join(sorted(one.text for one in both if isinstance(one, specexec.Completion))))
            plan = offload.stream_of(llm._model).placement
            assert llm.room.admits([100], 100)
        placements.append(plan)
        # So little that keys and values have to go, and a layer or two besides.
        assert plan.device_B is not None
        small_gpu[0] = plan.device_B - plan.kept_B("device") - plan.need.cache_B // 2 + 2 * plan.need.widest_B
    assert len(texts) == 2
    at_home, away = placements
    assert "ram" not in at_home.caches
    assert away.caches.count("ram") > len(away.caches) // 2
    assert "KV of" in away.summary or "KV in RAM" in away.summary
    assert away.link_B > away.cache_link_B > 0


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3_text", "opt"])
def test_token_ids_are_looked_up_in_ram_unless_the_matrix_is_the_head(
    family: str, tmp_path: Path, small_gpu: list[int]
) -> None:
    expected = logits_of(tiny(family, tmp_path), torch.arange(2, 12)[None])
    loaded = offload.load(tmp_path, "none", dtype="f32")
    placement = offload.stream_of(loaded).placement
    assert torch.equal(logits_of(loaded, torch.arange(2, 12)[None]), expected)
    assert placement.embeddings_in_ram == (placement.need.head_B > 0)
    assert bool(loaded.get_input_embeddings()._forward_hooks) == placement.embeddings_in_ram
    assert placement.embeddings_in_ram == (loaded.get_input_embeddings().weight is not loaded.lm_head.weight)


def test_only_rows_of_the_embeddings_go_to_the_device() -> None:
    moved = torch.nn.Embedding(5, 3)
    model._look_up_in_ram(moved, torch.device("meta"))
    assert moved(torch.arange(4)).device.type == "meta", "only rows go to the device"
    assert moved.weight.device.type == "cpu"


def test_rows_stay_pinned_while_a_view_of_them_exists() -> None:
    here = StandIn()
    rows = DeviceCarrier(here).memory(torch.zeros(1, dtype=torch.bfloat16), (2, 5, 3))
    pinned = ("pinned", rows.data_ptr(), 60)
    assert (rows.shape, rows.dtype, here.log) == ((2, 5, 3), torch.bfloat16, [pinned])
    seen = rows[0]
    gone = weakref.ref(rows)
    del rows
    assert gone() is None
    assert here.log == [pinned]
    del seen
    assert here.log == [pinned, ("unpinned", pinned[1])]


def test_ram_that_cannot_be_pinned_is_used_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    carrying = DeviceCarrier(StandIn(outcome=2))
    for _ in range(2):
        carrying.memory(torch.zeros(1), (4,)).fill_(1)
    assert caplog.text.count("could not pin 16 B of RAM for keys and values: their copies are slower.") == 1
    assert carrier.log.name == "offload.machine.host_rows"
