"""A sweep is a transaction: a stop, an interrupt or a broken file at any layer leaves text and caches as they were."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.errors import SweepCancelled
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.text.sequence import Sequence
from tests.tiny import LAYERS, VOCABULARY, tiny
from tests.waiting import until
from tests.writing import prompt, sequence_of, write

SAMPLING = SamplingParams(temperature=0.9, seed=1, max_tokens=20)
PROMPT = prompt(17)


def run(decoder: Decoder) -> None:
    while decoder.live:
        decoder.step()


class Fixture:
    """A decoder in the middle of a text, and what it must come to."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny("llama", folder / "target")
        self.target = TreeLM(self.model)
        self.drafter = SiblingDrafter(TreeLM(tiny("llama", folder / "draft", seed=1)), VOCABULARY)
        self.expected = write(self.target, self.drafter, [PROMPT], SAMPLING, budget=8)[0].answer
        self.decoder = Decoder(self.target, self.drafter, BestFirst(), 8)
        self.sequence = sequence_of(PROMPT, SAMPLING)
        self.decoder.join(self.sequence)
        self.decoder.step()

    def at_layer(self, layer: int, act: Callable[[], None]) -> None:
        """Run `act` the next time that the target reaches a layer, and only then."""

        def once(*_: object) -> None:
            handle.remove()
            act()

        layers = self.model.model.layers
        assert isinstance(layers, nn.ModuleList)
        handle = layers[layer].register_forward_pre_hook(once)

    def settled(self, act: Callable[[], object]) -> Callable[[], None]:
        """`act`, once the main thread has begun the sweep: before that there is nothing to stop."""

        def later() -> None:
            until(lambda: self.decoder._sweeping is not None)
            act()

        return later

    def finish(self) -> list[int]:
        run(self.decoder)
        return self.sequence.answer


@pytest.fixture
def middle(tmp_path: Path) -> Iterator[Fixture]:
    fixture = Fixture(tmp_path)
    yield fixture
    fixture.target.close()


def committed(sequence: Sequence, lm: TreeLM) -> tuple[list[int], torch.Tensor]:
    cache = sequence.cache(lm)
    assert not cache.parents
    return list(cache.tokens), cache.layers[0].keys_HRD[:, : len(cache)].clone()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_stop_keeps_what_was_written(middle: Fixture, layer: int) -> None:
    tokens, keys = committed(middle.sequence, middle.target)
    written = list(middle.sequence.answer)
    middle.at_layer(layer, middle.settled(middle.decoder.stop))
    (step,) = middle.decoder.step()
    assert step.burst.finish_reason == middle.sequence.finish_reason == "interrupted"
    assert middle.sequence.answer == written == middle.expected[: len(written)]
    assert not middle.decoder.live
    after = committed(middle.sequence, middle.target)
    assert after[0] == tokens
    assert torch.equal(after[1], keys)

    middle.sequence.finish_reason = None  # go on where it stopped
    middle.decoder.join(middle.sequence)
    assert middle.finish() == middle.expected


@pytest.mark.parametrize("layer", range(LAYERS))
def test_an_error_in_a_layer_surfaces_and_the_next_sweep_works(middle: Fixture, layer: int) -> None:
    def fail() -> None:
        raise OSError("layer on fire")

    before = committed(middle.sequence, middle.target)
    middle.at_layer(layer, fail)
    with pytest.raises(OSError, match="on fire"):
        middle.decoder.step()
    after = committed(middle.sequence, middle.target)
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    assert middle.finish() == middle.expected


def test_an_interrupt_ends_the_sweep_before_it_is_raised(middle: Fixture) -> None:
    """KeyboardInterrupt reaches the main thread; the sweeping thread must have stopped by the time it is seen."""

    def interrupt() -> None:
        sweep = middle.decoder._sweeping
        assert sweep is not None
        time.sleep(0.3)  # a signal between two looks of Python's, just before it waits, would be seen after the wait
        os.kill(os.getpid(), signal.SIGINT)  # a real one: it wakes a thread that waits
        until(sweep._cancelled.is_set)  # by the main thread

    middle.at_layer(1, middle.settled(interrupt))
    with pytest.raises(KeyboardInterrupt):
        middle.decoder.step()
    committed(middle.sequence, middle.target)
    assert middle.finish() == middle.expected


def test_a_late_stop_does_not_end_the_next_answer(middle: Fixture) -> None:
    assert middle.finish() == middle.expected
    middle.decoder.stop()
    again = sequence_of(PROMPT, SAMPLING)
    middle.decoder.join(again)
    run(middle.decoder)
    assert again.answer == middle.expected


def test_a_cancelled_sweep_commits_nothing(middle: Fixture) -> None:
    cache = KVCache()
    sweep = middle.target.begin([Rows(cache, PROMPT, range(-1, len(PROMPT) - 1))])
    sweep.cancel()
    try:
        sweep.result()
    except SweepCancelled:
        assert not cache.parents
        assert not cache.tokens


def test_a_shard_cut_short_stops_the_sweep_and_the_next_one_works(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny("llama", folder)
    target = TreeLM(offload.load(folder, "disk"))
    drafter = SiblingDrafter(TreeLM(offload.load(folder, "none")), VOCABULARY)
    expected = write(target, drafter, [PROMPT], SAMPLING, budget=8)[0].answer
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    decoder = Decoder(target, drafter, BestFirst(), 8)
    sequence = sequence_of(PROMPT, SAMPLING)
    decoder.join(sequence)
    decoder.step()
    with shard.open("r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(offload.ReadFailed, match="layer"):
        run(decoder)
    with shard.open("r+b") as file:
        file.write(whole)
    run(decoder)
    assert sequence.answer == expected
