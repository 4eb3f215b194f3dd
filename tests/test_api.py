"""The Python API under threads, open streams and wrong values: serialised or refused by name, and no text changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import specexec
from cli.terminal.answer import Answer, ending
from specexec import Completion, Continuation, Failure, SamplingParams, SpecexecError
from specexec.compose.earlier_runs import EarlierRuns
from specexec.compose.load import assemble
from specexec.compose.load_options import LoadOptions
from specexec.compose.progress import LoadProgress
from specexec.engine.engine import Engine

PROMPTS = ["List the days of the week.", "What is a drafter?", "Count to 10.", "The import statement"]
SAMPLING = SamplingParams(temperature=0.9, seed=3, max_tokens=16)


@pytest.fixture(scope="module")
def llm() -> Iterator[Engine]:
    with specexec.load("demo", drafter="sibling", dtype="f32", budget=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(llm: Engine) -> list[tuple[int, ...]]:
    return [llm.generate(prompt, SAMPLING).tokens for prompt in PROMPTS]


def test_generate_works_while_a_stream_is_open_and_the_stream_goes_on(
    llm: Engine, expected: list[tuple[int, ...]]
) -> None:
    stream = llm.stream(PROMPTS[0], SAMPLING)
    first = next(stream)
    assert llm.generate(PROMPTS[1], SAMPLING).tokens == expected[1]
    many = {one.index: one for one in llm.generate_many(PROMPTS, [SAMPLING] * 4)}
    assert [many[at].tokens for at in range(4) if isinstance(many[at], Completion)] == expected  # type: ignore[union-attr]
    assert (*first.tokens, *(token for burst in stream for token in burst.tokens)) == expected[0]
    assert not llm._decoder.live


def test_four_threads_at_once_get_their_own_texts(llm: Engine, expected: list[tuple[int, ...]]) -> None:
    def streamed(at: int) -> tuple[int, ...]:
        return tuple(token for burst in llm.stream(PROMPTS[at], SAMPLING) for token in burst.tokens)

    def likely(at: int) -> list[float]:
        asked = [Continuation(llm.encode(PROMPTS[at]), expected[at])]
        return [one.total for _, one in llm.likelihoods(asked)]

    alone = [likely(at) for at in range(4)]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(streamed, at) for at in range(4)]
        whole = [pool.submit(llm.generate, prompt, SAMPLING) for prompt in PROMPTS]
        likelihoods = [pool.submit(likely, at) for at in range(4)]
        assert [one.result(timeout=120) for one in streams] == expected
        assert [one.result(timeout=120).tokens for one in whole] == expected
        assert [one.result(timeout=120) for one in likelihoods] == [pytest.approx(each, abs=1e-3) for each in alone]
    assert not llm._decoder.live


def test_a_thread_that_abandons_its_stream_delays_no_other(llm: Engine, expected: list[tuple[int, ...]]) -> None:
    left: list[object] = []

    def begin() -> None:
        stream = llm.stream(PROMPTS[2], SAMPLING)
        next(stream)
        left.append(stream)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(timeout=60)
    assert llm.generate(PROMPTS[0], SAMPLING).tokens == expected[0]
    left.clear()
    assert llm.generate(PROMPTS[1], SAMPLING).tokens == expected[1]
    assert not llm._decoder.live


def test_a_prompt_that_fails_ends_no_other(llm: Engine, expected: list[tuple[int, ...]]) -> None:
    prompts = ["", PROMPTS[0], [10**7], PROMPTS[1], "word " * 9000, PROMPTS[2], [{"role": "user"}], PROMPTS[3]]
    found = {one.index: one for one in llm.generate_many(prompts, [SAMPLING] * 8)}  # type: ignore[arg-type]
    assert [one.tokens for _, one in sorted(found.items()) if isinstance(one, Completion)] == expected
    codes = [found[at].code for at in (0, 2, 4) if isinstance(found[at], Failure)]  # type: ignore[union-attr]
    assert codes == ["empty_prompt", "unknown_token", "context_length_exceeded"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": -1}, {"budget": "many"}, {"budget": 2.5}, {"budget": True}, {"dtype": "f64"},
        {"dtype": None}, {"offload": "x"}, {"ctx": 0}, {"ctx": -5}, {"ctx": "8k"}, {"drafter": 3}, {"drafter": None},
        {"device": "tpu"}, {"device": "cuda:99"}, {"ram_B": 0}, {"vram_B": "8GB"}, {"draft_vocab": 0},
        {"draft_window": 0},
        {"drafter_quant": "int8"}, {"head_quant": "int8"}, {"link_limit_Bps": 0}, {"exact": "yes"}, {"model": None},
    ],
    ids=str,
)  # fmt: skip
def test_load_refuses_by_name_what_a_keyword_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(SpecexecError, match=next(iter(wrong))) as refusal:
        specexec.load(**{"model": "demo", **wrong})  # type: ignore[arg-type]  # that is the point
    assert refusal.value.code == "bad_option"


def test_a_planner_is_refused_by_name_and_a_keyword_that_is_none_of_loads_too() -> None:
    with pytest.raises(SpecexecError, match="planner") as refusal:
        assemble("demo", LoadOptions(), LoadProgress(), EarlierRuns(), planner="worst")
    assert refusal.value.code == "bad_option"
    with pytest.raises(TypeError, match="buget"):
        specexec.load("demo", buget=4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "hot"}, {"max_tokens": 2.5}, {"seed": 1.5}, {"stop": 3}, {"top_k": True}, {"logit_bias": "x"},
        {"bad_words_ids": [[]]}, {"suppress_tokens": [-1]}, {"sequence_bias": {3: 1.0}}, {"ignore_eos": 1},
        {"temperature": float("nan")}, {"exponential_decay_length_penalty": (1,)}, {"stop_token_ids": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_refuses_by_name_what_a_field_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(SpecexecError, match=next(iter(wrong))) as refusal:
        SamplingParams(**wrong)  # type: ignore[arg-type]  # that is the point
    assert refusal.value.code == "bad_sampling"


def test_lists_and_mappings_are_taken_as_well(llm: Engine) -> None:
    plain = SamplingParams(stop=("a",), logit_bias=((5, 1.0),), bad_words_ids=((1, 2),))
    assert SamplingParams(stop="a", logit_bias={5: 1.0}, bad_words_ids=[[1, 2]]) == plain  # type: ignore[arg-type]
    with pytest.raises(SpecexecError, match="parallel"):
        list(llm.generate_many(PROMPTS, SAMPLING, parallel=0))
    with pytest.raises(SpecexecError, match="budget"):
        llm.budget = -1


def test_the_limit_that_ended_a_text_is_reported() -> None:
    with specexec.load("demo", drafter="none", ctx=24) as small:
        prompt = small.encode("The import statement")
        free = SamplingParams(max_tokens=512, ignore_eos=True)
        full, asked = small.generate(prompt, free), small.generate(prompt, SamplingParams(max_tokens=3))
        (*_, last) = small.stream(prompt, free)
    assert (full.finish_reason, full.limit, last.limit) == ("length", "context", "context")
    assert (asked.finish_reason, asked.limit) == ("length", "max_tokens")
    said = [ending(Answer(finish_reason="length", limit=one.limit), 512, 24) for one in (full, asked)]
    assert ["--max-tokens" in str(line) for line in said] == [False, True]
    assert "context of 24 tokens is full" in str(said[0])


def test_a_closed_engine_says_so() -> None:
    engine = specexec.load("demo", drafter="none")
    stream = engine.stream(PROMPTS[0], SAMPLING)
    engine.close()
    engine.close()
    for ask in (lambda: next(stream), lambda: engine.generate(PROMPTS[0])):
        with pytest.raises(SpecexecError, match="the engine is closed") as refusal:
            ask()
        assert refusal.value.code == "engine_closed"
