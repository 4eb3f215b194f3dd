"""Ids that the embedding has no row for are refused by name, at every door of the library, and end no other text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

import specexec
from offload.names import demo_folder
from specexec import Completion, Failure, SamplingParams
from specexec.engine import Engine
from specexec.errors import BadSampling, UnknownToken
from specexec.work import Continuation, Request
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
