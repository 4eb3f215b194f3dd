"""Many prompts in one run: every text as if it were alone, places refilled at once, nothing paid twice."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Literal

import pytest

from specexec.drafters.cost import CostModel
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine import batch as batches
from specexec.engine.batch import Batch
from specexec.engine.decoder import Decoder, Step
from specexec.engine.request_types import Failure, Request, Result
from specexec.errors import ContextLengthExceeded
from specexec.model.cache import KVCache
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import BestFirst
from specexec.planning.memory_room import PLENTY, Room
from specexec.sampling.params import SamplingParams
from specexec.stats import Completion
from specexec.text.sequence import Sequence
from tests.tiny import VOCABULARY, tiny
from tests.writing import prompt, rows_read, sequence_of

TOKEN_B = 4 * 2 * 2 * 16 * 4  # 4 layers, keys and values, 2 heads of 16, float32


class Watched(Decoder):
    """Remembers of each sweep how many texts and new rows it carried, its guesses, and bytes of keys and values."""

    loads: list[int]
    rows: list[int]
    guesses: list[int]
    held_B: list[int]

    def step(self, kept: Items[int] = ()) -> list[Step]:
        live = [*self.live]
        self.loads.append(len(live))
        self.rows.append(sum(len(one.tokens) - one.processed for one in live if not one.processed))
        steps = super().step(kept)
        self.guesses.append(sum(step.burst.nodes for step in steps))
        self.held_B.append(sum(cache.size_B for one in live for cache in one.caches.values()))
        return steps


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("models")
    target = TreeLM(tiny("llama", folder / "target"))
    drafter = TreeLM(tiny("llama", folder / "drafter"))
    watched = Watched(target, SiblingDrafter(drafter, VOCABULARY), BestFirst(), 12)
    watched.loads, watched.rows, watched.guesses, watched.held_B = [], [], [], []
    yield watched
    target.close()
    drafter.close()


def prepare(request: Request) -> Sequence:
    tokens, sampling = request.prompt, request.sampling
    assert isinstance(tokens, list)
    if len(tokens) > 300:
        raise ContextLengthExceeded(f"the prompt has {len(tokens)} tokens, the context is 300.")
    return sequence_of(tokens, sampling)


def requests(count: int, longest: int = 24) -> list[Request]:
    """Prompts and answers of very different lengths, each with a seed of its own."""
    chance = random.Random(count)
    return [
        Request(
            index,
            prompt(chance.randrange(1, 40), seed=index),
            SamplingParams(max_tokens=chance.randrange(1, longest), temperature=0.8, seed=index),
        )
        for index in range(count)
    ]


def run(decoder: Watched, wanted: list[Request], parallel: int, room: Room = PLENTY) -> list[Result]:
    decoder.loads, decoder.rows, decoder.guesses, decoder.held_B = [], [], [], []
    decoder.limit.room = room
    return list(Batch(decoder, prepare, room, wanted, parallel))


def texts(results: list[Result]) -> dict[int, tuple[int, ...]]:
    assert all(isinstance(result, Completion) for result in results)
    return {result.index: result.tokens for result in results if isinstance(result, Completion)}


def test_a_text_is_the_same_alone_together_and_in_any_order(decoder: Watched) -> None:
    wanted = requests(9)
    alone = texts([result for one in wanted for result in run(decoder, [one], 1)])
    assert texts(run(decoder, wanted, 4)) == alone
    assert texts(run(decoder, wanted[::-1], 9)) == alone


def test_a_place_that_becomes_free_is_taken_in_the_next_sweep(decoder: Watched) -> None:
    run(decoder, requests(9), 3)
    busy = decoder.loads[: -decoder.loads[::-1].index(3)]
    assert set(busy) == {3}, "as long as a text waits, every sweep is full"


def test_results_come_as_they_finish(decoder: Watched) -> None:
    wanted = [
        Request(index, prompt(5, seed=index), SamplingParams(max_tokens=length, seed=index))
        for index, length in enumerate([60, 1, 20])
    ]
    assert [result.index for result in run(decoder, wanted, 3)] == [1, 2, 0]


def test_a_bad_prompt_costs_itself_and_nothing_else(decoder: Watched) -> None:
    wanted = requests(4)
    good = texts(run(decoder, wanted, 4))
    wanted.insert(2, Request(7, prompt(301), SamplingParams()))
    results = run(decoder, wanted, 2)
    failures = [result for result in results if isinstance(result, Failure)]
    assert [(failure.index, failure.code) for failure in failures] == [(7, "context_length_exceeded")]
    assert texts([result for result in results if not isinstance(result, Failure)]) == good


def test_requests_are_taken_only_when_there_is_a_place(decoder: Watched) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Request]:
        while True:
            taken.append(len(taken))
            yield Request(len(taken), prompt(4), SamplingParams(max_tokens=8, seed=1))

    batch = Batch(decoder, prepare, PLENTY, endless(), 2)
    batch.sweep()
    assert len(taken) == 2
    batch.close()
    assert not decoder.live


def test_memory_decides_how_many_fit(decoder: Watched) -> None:
    wanted = requests(6)
    longest = max(len(one.prompt) + one.sampling.max_tokens for one in wanted)
    one = Room(free_B=0, token_B=100).need_B(longest)
    expected = texts(run(decoder, wanted, 6))
    assert max(decoder.loads) == 6
    assert texts(run(decoder, wanted, 6, Room(2 * one, 100))) == expected
    assert max(decoder.loads) == 2
    assert texts(run(decoder, wanted, 6, Room(0, 100))) == expected
    assert max(decoder.loads) == 1, "one text always fits: the placement has promised it"


def test_the_room_a_text_needs_is_never_below_what_it_takes(decoder: Watched) -> None:
    batch = Batch(decoder, prepare, PLENTY, requests(3, longest=200), 3)
    room = Room(0, token_B=2 * 4 * 2 * 2 * 16 * 4)  # two models, 4 layers, keys and values, 2 heads of 16, float32
    sizes = {}
    while not batch.done:
        batch.sweep()
        for sequence in decoder.live:
            sizes[sequence] = sum(cache.size_B for cache in sequence.caches.values())
    for sequence, size_B in sizes.items():
        assert size_B <= room.need_B(sequence.prompt_length + sequence.sampling.max_tokens + 12)


@pytest.mark.parametrize(("parallel", "budget"), [(2, 100), (16, 100), (64, "auto")])
def test_memory_stays_within_its_room_however_many_are_asked_for(
    decoder: Watched, parallel: int, budget: int | Literal["auto"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.limit, "budget", budget)
    monkeypatch.setattr(decoder.accounting, "cost", CostModel())
    bare = Room(0, TOKEN_B, draft_B=TOKEN_B, least=64, rows=60)
    room = replace(bare, free_B=3 * bare.need_B(200, 100))
    wanted = [Request(one.index, one.prompt, replace(one.sampling, temperature=2.0)) for one in requests(6, longest=12)]
    expected = texts(run(decoder, wanted, 3))
    assert texts(run(decoder, wanted, parallel, room)) == expected
    assert room.free_B // 8 < max(decoder.held_B) <= room.free_B
    assert max(decoder.guesses) > (0 if budget == "auto" else 80)  # auto asks the clock
    for load, guesses in zip(decoder.loads, decoder.guesses, strict=True):
        assert guesses <= load * room.nodes([1] * load, 4096)
    assert max(decoder.rows) <= 60, "of prompts that are read in the same sweep"


def test_who_joins_makes_the_others_give_back_memory(decoder: Watched) -> None:
    decoder.limit.room = PLENTY
    first = prepare(Request(0, prompt(30), SamplingParams(max_tokens=40, temperature=2.0, seed=1)))
    decoder.join(first)
    decoder.limit.budget = 600
    decoder.step()
    assert first.cache(decoder.target).size_B > 512 * TOKEN_B
    decoder.limit.room = Room(4 * 256 * TOKEN_B, TOKEN_B, draft_B=TOKEN_B)  # nothing but the texts
    decoder.join(prepare(Request(1, prompt(30, 2), SamplingParams(max_tokens=40, seed=2))))
    decoder.limit.budget = 12
    assert {cache.size_B for cache in first.caches.values()} == {256 * TOKEN_B}
    for one in [*decoder.live]:
        decoder.leave(one)


def test_many_items_leave_nothing_behind(decoder: Watched) -> None:
    def held() -> int:
        gc.collect()
        return sum(isinstance(one, (Sequence, KVCache)) for one in gc.get_objects())

    run(decoder, requests(4, longest=6), 4)
    before = held()
    run(decoder, requests(40, longest=6), 8)
    assert held() <= before


def test_a_common_beginning_is_computed_once(decoder: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WORTH_WAITING", 64)
    system = prompt(120, seed=99)
    wanted = [
        Request(index, system + prompt(6, seed=index), SamplingParams(max_tokens=30, temperature=0.9, seed=index))
        for index in range(4)
    ]
    alone = texts([result for one in wanted for result in run(decoder, [one], 1)])
    rows = rows_read(decoder.target, monkeypatch)
    assert texts(run(decoder, wanted, 4)) == alone
    assert decoder.loads[:2] == [1, 4], "the others wait one sweep for the keys of the first"
    assert max(rows[1:]) < 120


def test_an_interrupted_run_goes_on_where_it_was(decoder: Watched) -> None:
    wanted = requests(5, longest=30)
    expected = texts(run(decoder, wanted, 3))
    decoder.loads = []
    batch = Batch(decoder, prepare, PLENTY, wanted, 3)
    first = [result for _ in range(3) for result in batch.sweep()]
    begun = {partial.index: partial.tokens for partial in batch.partial}
    assert any(begun.values())
    decoder.stop()
    stopped = batch.sweep()
    assert batch.done
    assert begun.items() <= {one.index: one.tokens for one in stopped if isinstance(one, Completion)}.items()
    done = texts(first)
    rest = [
        Request(one.index, one.prompt, one.sampling, begun.get(one.index, ()))
        for one in wanted
        if one.index not in done
    ]
    assert done | texts(run(decoder, rest, 3)) == expected


def test_an_answer_that_had_ended_is_given_back_without_a_sweep(decoder: Watched) -> None:
    one = requests(1)[0]
    (whole,) = run(decoder, [one], 1)
    assert isinstance(whole, Completion)
    (again,) = run(decoder, [Request(0, one.prompt, one.sampling, whole.tokens)], 1)
    assert isinstance(again, Completion)
    assert (again.tokens, again.text, again.finish_reason) == (whole.tokens, whole.text, whole.finish_reason)
    assert decoder.loads == []
