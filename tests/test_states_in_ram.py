"""States of recurrent layers that live in RAM change no token and no bit. A CPU plays the GPU; copies come late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import offload
import specexec
from offload.hub.names import demo_folder
from specexec import SamplingParams
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.errors import SweepCancelled
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Travel
from specexec.model.tree_lm import Rows, TreeLM, trunk_name
from specexec.text.sequence import Sequence
from tests.test_cache_in_ram import Late, playing_gpu
from tests.test_recurrent import built
from tests.tiny import VOCABULARY
from tests.writing import prompt, write

# One of each kind of state; kinds beside attention in one layer, and in layers without any.
FAMILIES = ["qwen3_5_text", "kimi_linear", "mamba", "mamba2", "lfm2", "falcon_h1", "zamba2", "nemotron_h", "jamba"]
PROMPTS = [prompt(20), prompt(300, 2)]


def travelling(lm: TreeLM, carrier: Late) -> TreeLM:
    """The same model with all that moves kept in RAM, but for its first layer."""
    return TreeLM(lm.model, travel=Travel(frozenset(range(1, len(lm.kinds))), carrier, with_states=True))


def states(cache: KVCache) -> dict[object, Tensor]:
    return {key: memory.text for key, memory in cache.memories.items()}


def assert_same(ours: KVCache, theirs: KVCache) -> None:
    assert len(ours) == len(theirs)
    assert states(ours).keys() == states(theirs).keys()
    for key, state in states(ours).items():
        assert torch.equal(state, states(theirs)[key]), key
    assert [one.length for one in ours.snapshots] == [one.length for one in theirs.snapshots]
    for mine, other in zip(ours.snapshots, theirs.snapshots, strict=True):
        assert all(torch.equal(mine.states[key], other.states[key]) for key in other.states)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_states_are_the_same_bit_for_bit(family: str) -> None:
    def written(target: TreeLM) -> list[Sequence]:
        drafter = SiblingDrafter(TreeLM(target.model), VOCABULARY, Ranking(shared_noise=False))
        sampling = SamplingParams(max_tokens=10, temperature=0.9, seed=3)
        return write(target, drafter, PROMPTS, sampling, 16, overlap=False)

    here, carrying = TreeLM(built(family)), Late()
    away = travelling(here, carrying)
    for one, other in zip(written(here), written(away), strict=True):
        assert one.tokens == other.tokens
        assert_same(one.caches[here], other.caches[away])
        homes = [memory for (layer, _), memory in other.caches[away].memories.items() if layer]
        assert homes
        assert all(memory.shelf is not None for memory in homes)
    assert carrying.moved_B > 0


@pytest.fixture(scope="module", params=["qwen3_5_text", "kimi_linear", "mamba"])
def lm(request: pytest.FixtureRequest) -> TreeLM:
    return TreeLM(built(request.param))


def test_a_sweep_that_fails_leaves_nothing_moving_and_the_text_as_it_was(lm: TreeLM) -> None:
    carrying, text = Late(), prompt(50)
    away, cache, same = travelling(lm, carrying), KVCache(), KVCache()
    layer = lm.model.get_submodule(f"{trunk_name(lm.model)}.layers.{len(lm.kinds) - 1}")
    for one, rows in ((away, cache), (lm, same)):
        one.forward([Rows.text(rows, text[:30])])
        rows.commit(range(30))
        one.forward([Rows(rows, text[30:33], [-1, 0, 0])])
        rows.commit([0, 2])  # which has yet to be followed

    def cancelled(*_: object, **__: object) -> None:
        raise SweepCancelled

    forward, layer.forward = layer.forward, cancelled
    for settled in (0, 5):
        with pytest.raises(SweepCancelled):
            away.forward([Rows(cache, text[:10], range(-1, 9), settled)])
        assert not carrying.waiting
        assert (len(cache), cache.parents) == (32, [])
    layer.forward = forward
    assert_same(cache, same)
    more = [lm.forward([Rows(same, text[33:], range(-1, 16))]), away.forward([Rows(cache, text[33:], range(-1, 16))])]
    assert torch.equal(*(hidden for (hidden,) in more))


def test_beginnings_kept_branches_and_rewound_texts_travel_too(lm: TreeLM) -> None:
    away, text, found = travelling(lm, Late()), prompt(70), []
    cache, same = KVCache(), KVCache()
    branch, other = KVCache(), KVCache()
    for one, rows in ((lm, same), (away, cache)):
        one.forward([Rows.text(rows, text[:40])])
        rows.commit(range(40))
        one.forward([Rows(rows, text[40:60], [-1, *range(9), 4, *range(10, 19)])])  # two branches
        rows.commit([*range(5), 10, 11], keep=[12, 13])
        one.forward([Rows(rows, [5, 6], [1, -1])])
        rows.commit([0, 1])  # which has yet to be followed when it is copied
        copy = rows.prefix(len(rows))
        one.forward([Rows.text(copy, text[60:])])
        copy.commit(range(10))
        found.append(one.forward([Rows(rows, text[:9], range(-1, 8)), Rows(copy, text[20:25], range(-1, 4))]))
        rows.commit([0])
        rows.rewind(33)
        found.append(one.forward([Rows.text(rows, text[len(rows) : 45])]))
        rows.commit(range(45 - len(rows)))
        branch, other = copy, branch
    assert all(
        torch.equal(ours, theirs) for at in (0, 1) for ours, theirs in zip(found[at], found[at + 2], strict=True)
    )
    assert_same(cache, same)
    assert_same(branch, other)


def test_texts_give_back_what_nodes_took_in_ram(lm: TreeLM) -> None:
    away, cache = travelling(lm, Late()), KVCache()
    away.forward([Rows(cache, prompt(200), [-1] * 200)])
    held_B, nodes_B = cache.size_B, sum(memory.nodes.size_B for memory in cache.memories.values())
    cache.commit([0])
    cache.give_back(tokens=10, nodes=4)
    assert cache.size_B <= held_B - 0.9 * nodes_B < held_B
    (ours,) = away.forward([Rows(cache, [3, 4], [-1, 0])])
    same = KVCache()
    lm.forward([Rows(same, prompt(200), [-1] * 200)])
    same.commit([0])
    assert torch.equal(ours, lm.forward([Rows(same, [3, 4], [-1, 0])])[0])


def test_a_hybrid_that_does_not_fit_a_gpu_keeps_states_in_ram_and_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_B = playing_gpu(monkeypatch)
    encoding = AutoTokenizer.from_pretrained(demo_folder("target"))
    encoding.save_pretrained(tmp_path)
    built("jamba", vocab_size=len(encoding), num_hidden_layers=9).save_pretrained(tmp_path)
    texts, placements, rooms = set[str](), [], []
    for _ in range(2):
        with specexec.load(str(tmp_path), drafter="ngram", offload="ram", budget=64, ctx=256, dtype="f32") as llm:
            many = llm.generate_many(["A list is", "The for loop"], SamplingParams(max_tokens=12, seed=1))
            texts.add("|".join(sorted(one.text for one in many if isinstance(one, specexec.Completion))))
            placement = offload.stream_of(llm._model).placement
        placements.append(placement)
        rooms.append(llm.room)
        assert placement.device_B is not None
        passing_B = 2 * placement.need.widest_B + sum(sorted(placement.need.kept_B)[-6:])
        gpu_B[0] = placement.device_B - placement.kept_B("device") - sum(placement.need.kept_B) + passing_B
    assert len(texts) == 1
    at_home, away = placements
    assert "ram" not in at_home.caches
    assert at_home.device_parts_B["recurrent states"] == sum(at_home.need.states_B.values()) > 0
    assert away.host_parts_B["recurrent states"] > 0
    assert "states in RAM" in away.summary
    assert rooms[1].text_B < rooms[0].text_B
    assert rooms[1].node_B < rooms[0].node_B
    assert rooms[1].beside is not None
    assert rooms[1].beside.node_B > 0
