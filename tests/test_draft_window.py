"""A drafter with a window sees the first tokens of a text and the last ones: the text stays the target's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specexec
from cli.engine.prefix_chain import PrefixChain
from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import LAST
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.planning.memory_room import Room
from specexec.sampling.params import SamplingParams
from specexec.sizes import GROWTH_ROWS, PIECE, SINKS, rows_held, windowed
from tests.mtp_models import chain_model
from tests.test_dflash import Case as BlockCase
from tests.test_mtp import Case as MtpCase
from tests.tiny import VOCABULARY, Option, tiny
from tests.writing import prompt, sequence_of, write

WIDTH = 32  # of the window
LONG = 1500
MOST = windowed(LONG, WIDTH)
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=12),
]


def small(family: str, folder: Path) -> PreTrainedModel:
    kinds: dict[str, Option] = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma2" else {}
    return tiny(family, folder, num_hidden_layers=2, max_position_embeddings=4096, **kinds)  # type: ignore[arg-type]  # options alone


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TreeLM]:
    lm = TreeLM(small("llama", tmp_path_factory.mktemp("target")))
    yield lm
    lm.close()


def kept_after(length: int) -> list[int]:
    """The positions that a cache still has after a text of so many tokens was read piece by piece."""
    held = list[int]()
    for first in range(0, length, PIECE):
        held += range(first, min(first + PIECE, length))
        if len(held) - SINKS - WIDTH >= GROWTH_ROWS:
            held = held[:SINKS] + held[len(held) - WIDTH :]
    return held


def as_read(length: int) -> Tensor:
    """Which positions each row saw, bool [R, R]: those that were kept when its piece came, and those of its piece."""
    sees_RR = torch.zeros(length, length, dtype=torch.bool)
    for first in range(0, length, PIECE):
        end = min(first + PIECE, length)
        sees_RR[first:end, kept_after(first)] = True
        sees_RR[first:end, first:end] = torch.ones(end - first, end - first).tril().bool()
    return sees_RR


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_computes_what_transformers_computes_of_what_it_sees(family: str, tmp_path: Path) -> None:
    """Positions stay those of the text; windows of the model's own layers are measured in the text, not in rows."""
    text, model = prompt(LONG, 3), small(family, tmp_path)
    sees_RR = as_read(LONG)
    far_RR = (torch.arange(LONG)[:, None] - torch.arange(LONG)) >= 8
    full, slid = (torch.where(one, 0.0, float("-inf"))[None, None] for one in (sees_RR, sees_RR & ~far_RR))
    masks = {"full_attention": full, "sliding_attention": slid} if family == "gemma2" else full
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted_RH = model.get_submodule("model")(torch.tensor([text]), attention_mask=masks).last_hidden_state[0]
    cache, lm = KVCache(window=WIDTH), TreeLM(model)
    found = list[Tensor]()
    for first in range(0, LONG, PIECE):
        part = Rows.text(cache, text[first : first + PIECE])
        found += lm.forward([part])
        cache.commit(range(len(part.tokens)))
    assert torch.allclose(torch.cat(found), wanted_RH, atol=2e-4)
    assert (cache.rows, cache.position) == (len(kept_after(LONG)), LONG)
    lm.close()


def members(target: TreeLM, folder: Path) -> dict[str, Drafter]:
    lm = TreeLM(small("llama", folder / "again"))
    ours = target.alike(lm.model)
    return {
        "sibling": SiblingDrafter(lm, VOCABULARY, window=WIDTH),
        "confident": SiblingDrafter(ours, VOCABULARY, Ranking(tau=0.01), window=WIDTH),
    }


@pytest.mark.parametrize(
    ("sampling", "overlap"), [*zip(SAMPLINGS, [False, True], strict=True)], ids=["greedy", "sampled"]
)
def test_the_text_is_that_of_plain_decoding(
    target: TreeLM, sampling: SamplingParams, overlap: bool, tmp_path: Path
) -> None:
    prompts = [prompt(LONG, 1), prompt(40, 2)]
    plain = write(target, NoDrafter(), prompts, sampling, limit=4096)
    for drafter in members(target, tmp_path).values():
        drafted = write(target, drafter, prompts, sampling, 16, overlap=overlap, limit=4096)
        assert [one.answer for one in drafted] == [one.answer for one in plain]
        assert isinstance(drafter, SiblingDrafter)
        for sequence in drafted:
            cache = sequence.caches[drafter.lm]
            assert cache.rows < SINKS + WIDTH + GROWTH_ROWS + PIECE
            assert all(kv.keys_HRD.shape[1] <= rows_held(MOST + GROWTH_ROWS) for kv in cache.layers.values())
        assert drafted[0].caches[drafter.lm].dropped > 1000


def test_a_text_that_goes_back_among_dropped_tokens_is_read_again(target: TreeLM) -> None:
    """Behind the first tokens, and never at the positions of others."""
    text, cache = prompt(LONG, 5), KVCache(window=WIDTH)

    def read(to: int) -> Tensor:
        parts = [text[at : min(at + PIECE, to)] for at in range(len(cache), to, PIECE)]
        for part in parts:
            (found_RH,) = target.forward([Rows.text(cache, part)])
            cache.commit(range(len(part)))
        return found_RH[-1]

    there_H = read(LONG)
    dropped = cache.dropped
    cache.rewind(LONG - 10)
    assert (len(cache), cache.dropped) == (LONG - 10, dropped), "those rows are there"
    assert len(cache.prefix(LONG - 20)) == LONG - 20
    assert len(cache.prefix(700)) == SINKS == cache.reusable(700)
    cache.rewind(700)
    assert (len(cache), cache.rows, cache.dropped) == (SINKS, SINKS, 0)
    cache.rewind(0)
    assert torch.allclose(read(LONG), there_H, atol=1e-5)


def test_what_sees_all_that_matters_is_accepted_whole(target: TreeLM, tmp_path: Path) -> None:
    """The target itself, with a window that is longer than the text: as without one."""
    drafter = SiblingDrafter(target.alike(target.model), VOCABULARY, Ranking(tau=0.01), window=LONG + 100)
    decoder = Decoder(target, drafter, BestFirst(), 5)
    decoder.join(sequence_of(prompt(LONG, 4), SAMPLINGS[1], 4096))
    for _ in range(2):
        (step,) = decoder.step()
        assert step.burst.accepted == 5


def test_heads_keep_no_more_than_that_either(tmp_path: Path) -> None:
    """Those that read states beside tokens, of which the text has fewer, and those that fill a block."""
    text, sampling = [prompt(LONG, 3, 95)], SamplingParams(temperature=0.0, max_tokens=6)
    chain_model("glm", tmp_path / "glm", 0.05)
    mtp = MtpCase(tmp_path / "glm")
    block = BlockCase(tmp_path / "target")
    states = TextStates(mtp.target, [LAST], range(96))
    heads: list[tuple[TreeLM, object, Drafter]] = [
        (
            mtp.target,
            mtp.lm,
            HeadDrafter(mtp.lm, HeadFeatures(mtp.lm, states), 95, window=WIDTH),
        ),
        (block.target, block.head, block.drafter(window=WIDTH)),
    ]
    for target, key, drafter in heads:
        drafter.context = 4096  # they were made for less, but their positions go on
        plain = write(target, NoDrafter(), text, sampling, vocabulary=96, limit=4096)
        drafted = write(target, drafter, text, sampling, 8, vocabulary=96, limit=4096)
        assert [one.answer for one in drafted] == [one.answer for one in plain]
        cache = drafted[0].caches[key]
        assert cache.dropped > 900
        assert cache.rows < SINKS + WIDTH + GROWTH_ROWS + PIECE


def test_a_block_sees_the_positions_that_are_left(tmp_path: Path) -> None:
    """As if all were there and the others hidden, also where its own layers have a window."""
    head, states_RF = BlockCase(tmp_path).head, torch.randn(LONG, 3 * 32, generator=torch.Generator().manual_seed(1))
    text, slid, whole = prompt(LONG, 7, 95), KVCache(window=WIDTH), KVCache()
    for cache in (slid, whole):
        head.read(cache, text, states_RF[:, : head.fc.in_features].clone())
    kept = [*range(SINKS), *range(LONG - WIDTH, LONG)]
    for kv in whole.layers.values():
        kv.move(torch.tensor(kept), 0)
    whole.dropped = LONG - len(kept)
    assert torch.allclose(head.fill(slid, 5), head.fill(whole, 5), atol=1e-5)


def test_a_kept_conversation_has_what_was_dropped(target: TreeLM, tmp_path: Path) -> None:
    text, caches = prompt(LONG, 8), {"target": KVCache(), "drafter": KVCache(window=WIDTH)}
    for cache in caches.values():
        for at in range(0, LONG, PIECE):
            target.forward([part := Rows.text(cache, text[at : at + PIECE])])
            cache.commit(range(len(part.tokens)))
    chain, there = PrefixChain(tmp_path), caches["drafter"]
    chain.keep(there, lambda _: True)
    found = chain.load([*text, 1], target.memory_of)
    assert found is not None
    assert (found.rows, found.dropped) == (there.rows, there.dropped)
    ends = [target.forward([Rows(cache, [1], [-1])])[0] for cache in (found, there)]
    assert torch.equal(*ends)


def test_fewer_rows_are_planned_for() -> None:
    room = Room(10**9, 0, draft_B=10, draft_rows=1000)
    assert room.need_B(100_000) == room.need_B(1000) < replace(room, draft_rows=2000).need_B(100_000)


def test_nothing_to_bound_is_refused() -> None:
    with pytest.raises(BadDrafter, match="--draft-window"):
        specexec.load(drafter="ngram", draft_window=64)
