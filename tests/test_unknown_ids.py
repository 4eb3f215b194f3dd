"""Ids that the embedding has no row for are refused by name, at every door of the library, and end no other text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from transformers import GenerationConfig

import specexec
from offload.hub.names import demo_folder
from specexec import Completion, Failure, SamplingParams
from specexec.engine.engine import Engine
from specexec.engine.request_types import Continuation, Request
from specexec.errors import BadSampling, UnknownToken
from specexec.sampling.model_defaults import defaults_of
from tests.tiny import tiny

ROWS = 3000  # fewer than the demo's tokenizer has entries
SHORT = SamplingParams(temperature=0.8, seed=1, max_tokens=4)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("cut")
    tiny("llama", folder, vocab_size=ROWS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / name, folder / name)
    with specexec.load(str(folder), drafter="ngram", offload="none", dtype="f32", budget=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def beyond(llm: Engine) -> str:
    """A text that the tokenizer writes with ids the model does not have."""
    words = (llm.decode([token]) for token in range(ROWS, len(llm.tokenizer)))
    return next(word for word in words if word.isascii() and max(llm.encode(word)) >= ROWS)


DOORS: dict[str, Callable[[Engine, list[int]], object]] = {
    "generate": lambda llm, ids: llm.generate(ids, SHORT),
    "stream": lambda llm, ids: list(llm.stream(ids, SHORT)),
    "written": lambda llm, ids: list(llm.stream([5, 6], SHORT, written=ids)),
    "join": lambda llm, ids: llm.join(ids, SHORT),
    "scores": lambda llm, ids: llm.scores([5, 6], ids, SHORT),
    "context": lambda llm, ids: list(llm.likelihoods([Continuation([5], [6]), Continuation(ids, [7])])),
    "continuation": lambda llm, ids: list(llm.likelihoods([Continuation([5], [6]), Continuation([7], ids)])),
}


@pytest.mark.parametrize("token", [ROWS, 10**9, -1])
@pytest.mark.parametrize("door", DOORS)
def test_an_id_beyond_the_embedding_is_refused_before_the_sweep(llm: Engine, door: str, token: int) -> None:
    before = llm.progress().sweeps
    with pytest.raises(UnknownToken, match=f"token {token}; this model has 0 to {ROWS - 1}") as refused:
        DOORS[door](llm, [5, token, 6])
    assert refused.value.code == "unknown_token"
    assert refused.value.hint
    assert llm.progress().sweeps == before


def test_text_whose_tokenizer_makes_such_ids_is_refused_too(llm: Engine, beyond: str) -> None:
    with pytest.raises(UnknownToken) as refused:
        llm.generate(beyond, SHORT)
    assert refused.value.why == f"its tokenizer has {len(llm.tokenizer):,} entries, more than the model has rows."


def test_a_biased_id_beyond_the_embedding_is_refused(llm: Engine) -> None:
    with pytest.raises(BadSampling, match=f"logit_bias names token {ROWS}; this model has 0 to {ROWS - 1}"):
        llm.generate([5, 6], SamplingParams(max_tokens=4, logit_bias=((ROWS, 1.0),)))


BEYOND: dict[str, object] = {
    "stop_token_ids": (5, ROWS),
    "suppress_tokens": (5, ROWS),
    "begin_suppress_tokens": (ROWS,),
    "forced_bos_token_id": ROWS + 1,
    "forced_eos_token_id": (ROWS + 2,),
    "bad_words_ids": ((5,), (6, ROWS)),
    "sequence_bias": (((5, ROWS), 1.0),),
}
BEYOND_WISHED = {name: value for name, value in BEYOND.items() if name != "stop_token_ids"}
BEYOND_WISHED["sequence_bias"] = [[[5, ROWS], 1.0]]  # as JSON has it


@pytest.mark.parametrize("field", BEYOND)
def test_an_id_beyond_the_embedding_is_refused_in_every_field(llm: Engine, field: str) -> None:
    wrong = replace(SHORT, **{field: BEYOND[field]})  # type: ignore[arg-type]
    with pytest.raises(BadSampling, match=f"{field} names token {ROWS // 10}[012]; this model has 0 to {ROWS - 1}"):
        llm.generate([5, 6], wrong)
    bad, good = llm.batch([Request(0, [5], wrong), Request(1, [5, 6], SHORT)])
    assert isinstance(bad, Failure)
    assert bad.code == "bad_sampling"
    assert isinstance(good, Completion)
    assert good.tokens == llm.generate([5, 6], SHORT).tokens


def test_ids_of_a_models_own_wishes_that_it_does_not_have_are_left_out_with_one_warning() -> None:
    found = defaults_of(GenerationConfig.from_dict(BEYOND_WISHED), rows=ROWS)
    (line,) = found.ignored
    assert all(name in line for name in BEYOND_WISHED)
    wished = found.sampling
    assert (wished.suppress_tokens, wished.begin_suppress_tokens) == ((5,), ())
    assert (wished.forced_bos_token_id, wished.forced_eos_token_id) == (None, ())
    assert (wished.bad_words_ids, wished.sequence_bias) == (((5,),), ())


def test_one_bad_prompt_ends_no_other(llm: Engine, beyond: str) -> None:
    good = [[5, 6, 7], [8, 9]]
    alone = [llm.generate(prompt, SHORT).tokens for prompt in good]
    requests = [
        Request(0, good[0], SHORT),
        Request(1, [5, ROWS], SHORT),
        Request(2, beyond, SHORT),
        Request(3, [5], SHORT, written=(6, ROWS)),
        Request(4, good[1], SHORT),
    ]
    results = {one.index: one for one in llm.batch(requests)}
    assert [one.code for one in results.values() if isinstance(one, Failure)] == ["unknown_token"] * 3
    assert [one.tokens for _, one in sorted(results.items()) if isinstance(one, Completion)] == alone
