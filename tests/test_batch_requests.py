"""What a request of a batch may ask beside a prompt: a grammar by its text, words for the template, probabilities."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

import specexec
from specexec.engine.engine import Engine
from specexec.engine.request_types import Failure, Request
from specexec.sampling.grammar import regex
from specexec.sampling.params import SamplingParams
from specexec.stats import Completion
from specexec.text.template_options import Wishes

SAMPLING = SamplingParams(max_tokens=12, temperature=0.8, seed=3)
ASKED: list[dict[str, object]] = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with specexec.load("demo", budget=8) as loaded:
        yield loaded


def only(engine: Engine, request: Request) -> Completion:
    (result,) = engine.batch([request])
    assert isinstance(result, Completion)
    return result


def test_a_grammar_travels_as_text_and_is_followed(engine: Engine) -> None:
    request = Request(0, ASKED, SAMPLING, grammar=regex("(red|blue)"))
    assert only(engine, pickle.loads(pickle.dumps(request))).text in ("red", "blue")


def test_a_grammar_that_cannot_be_read_costs_its_own_request(engine: Engine) -> None:
    found = {result.index: result for result in engine.batch([
        Request(0, ASKED, SAMPLING, grammar="start: nothing_of_that_name"), Request(1, ASKED, SAMPLING)
    ])}  # fmt: skip
    failed = found[0]
    assert isinstance(failed, Failure)
    assert failed.code == "bad_grammar"
    assert isinstance(found[1], Completion)


def test_the_template_gets_what_a_request_wishes(engine: Engine) -> None:
    said: list[dict[str, object]] = [*ASKED, {"role": "assistant", "content": "Blue"}]
    wishes = Wishes(ends_in="message")
    whole = only(engine, Request(0, said, SAMPLING, wishes=wishes))
    rendered = engine.encoding.encode_rest(engine.encoding.render(said, wishes))
    assert whole.prompt_tokens == len(rendered)
    assert whole.tokens == only(engine, Request(0, rendered, SAMPLING)).tokens


def test_probabilities_of_a_batch_are_those_of_a_stream(engine: Engine) -> None:
    asked = SamplingParams(max_tokens=12, temperature=0.8, seed=3, logprobs=2, prompt_logprobs=True)
    told = only(engine, Request(0, ASKED, asked))
    bursts = list(engine.stream(ASKED, asked))
    assert [one.token for one in told.logprobs] == list(told.tokens)
    for ours, theirs in (
        (told.logprobs, [one for burst in bursts for one in burst.logprobs]),
        (told.prompt_logprobs, [one for burst in bursts for one in burst.prompt_logprobs]),
    ):
        assert [one.token for one in ours] == [one.token for one in theirs]
        assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)
