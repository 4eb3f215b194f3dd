"""The Python door: what a user of `import specexec` may rely on. Runs the built-in pair for real."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload
import specexec
from offload.errors import OffloadError
from offload.hub.names import demo_folder
from specexec import Completion, Failure, SamplingParams
from specexec.engine.engine import Engine
from specexec.errors import BadText, ContextLengthExceeded, EmptyPrompt, UnsupportedArchitecture
from specexec.text.messages import Prompt

ROOT = Path(__file__).parent.parent
QUESTION = "How does specexec work?"
ASK = [{"role": "user", "content": QUESTION}]
SHORT = SamplingParams(max_tokens=12)


def texts_of(results: dict[int, Completion | Failure]) -> list[str]:
    return [one.text for _, one in sorted(results.items()) if isinstance(one, Completion)]


@pytest.fixture(scope="module")
def llm() -> Iterator[Engine]:
    with specexec.load("demo", drafter="sibling", offload="disk", dtype="f32", budget=32) as engine:
        yield engine


def test_the_readme_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks, "the README shows how to use the library"
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"print": lambda *_, **__: None})


def test_the_pair_writes_what_transformers_generates(llm: Engine) -> None:
    """The golden answers are those of transformers' own `generate`, as `test_demo.py` checks."""
    golden = json.loads((ROOT / "offload" / "demo" / "golden.json").read_text(encoding="utf-8"))
    asked = [[{"role": "user", "content": one["prompt"]}] for one in golden]
    results = {one.index: one for one in llm.generate_many(asked, SamplingParams(max_tokens=120))}
    assert texts_of(results) == [one["answer"] for one in golden]
    done = [one for one in results.values() if isinstance(one, Completion)]
    assert sum(one.sweeps for one in done) < sum(len(one.tokens) for one in done) / 3


def test_the_same_text_from_every_tier_budget_and_drafter(llm: Engine) -> None:
    expected = llm.generate(ASK, SamplingParams(temperature=0.9, seed=5, max_tokens=24))
    assert expected.tokens_per_sweep > 1.2
    for options in ({"offload": "none"}, {"offload": "ram", "budget": 5}, {"offload": "disk", "drafter": "none"}):
        with specexec.load("demo", dtype="f32", **options) as other:
            again = other.generate(ASK, SamplingParams(temperature=0.9, seed=5, max_tokens=24))
            assert again.tokens == expected.tokens, options


def test_bytes_read_are_those_of_the_sweeps(llm: Engine) -> None:
    sweep_B = llm._stream.bytes_per_sweep
    answer = llm.generate(ASK)
    assert answer.bytes_read == answer.sweeps * sweep_B > 0


def test_progress_counts_the_layers_of_the_running_sweep(llm: Engine) -> None:
    seen = set()
    layers = llm._model.model.layers
    handles = [layer.register_forward_hook(lambda *_: seen.add(llm.progress().layer)) for layer in layers]
    llm.generate(ASK, SHORT)
    for handle in handles:
        handle.remove()
    assert seen == {1, 2, 3, 4, 5}
    assert llm.progress().layer == llm.progress().layers == 5


def test_interleaved_streams_share_sweeps_and_keep_their_texts(llm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "budget", 2)  # several sweeps, however well the pair agrees
    samplings = [SamplingParams(temperature=0.8, seed=seed, max_tokens=20) for seed in (1, 2)]
    alone = [llm.generate(ASK, sampling).text for sampling in samplings]
    before = llm.progress().sweeps
    streams = [llm.stream(ASK, sampling) for sampling in samplings]
    texts, bursts = ["", ""], 0
    open_streams = {0, 1}
    while open_streams:
        for which in list(open_streams):
            burst = next(streams[which], None)
            if burst is None:
                open_streams.discard(which)
                continue
            texts[which] += burst.text
            bursts += 1
    assert texts == alone
    assert llm.progress().sweeps - before < bursts


def test_a_stream_that_is_left_early_leaves_nothing_behind(llm: Engine) -> None:
    stream = llm.stream(ASK)
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert not llm._decoder.live
    assert llm.generate(ASK, SHORT).sweeps


def test_a_conversation_processes_only_what_is_new(llm: Engine) -> None:
    talk = llm.conversation(system="Be brief.")
    first = "".join(burst.text for burst in talk.send(QUESTION, SHORT))
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    kept = len(talk._caches[llm._target])
    stream = talk.send("List the days of the week.", SHORT)
    next(stream)
    assert len(talk._caches[llm._target]) > kept > 20  # the first turn's rows were still there
    list(stream)
    asked: list[dict[str, object]] = [{"role": "system", "content": "Be brief."}, *talk.messages[:-1]]
    fresh = llm.generate(asked, SHORT)
    assert talk.messages[-1]["content"] == fresh.text
    assert talk.undo()
    assert [message["content"] for message in talk.messages] == [QUESTION, first]


def test_retrying_is_another_answer_only_where_chance_decides(llm: Engine) -> None:
    warm = SamplingParams(temperature=1.5, seed=3, max_tokens=12)
    talk = llm.conversation()
    first = "".join(burst.text for burst in talk.send("Tell me a story.", warm))
    again = "".join(burst.text for burst in talk.retry(warm))
    assert again != first
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_one_seed_for_many_prompts_is_one_seed_each(llm: Engine) -> None:
    warm = SamplingParams(temperature=1.5, seed=7, max_tokens=16)
    twice = ["The import statement"] * 2
    answers = {one.index: one for one in llm.generate_many(twice, warm)}
    again = {one.index: one for one in llm.generate_many(twice, warm, parallel=1)}
    assert [texts[0] != texts[1] for texts in (texts_of(answers), texts_of(again))] == [True, True]
    assert texts_of(answers) == texts_of(again)


def test_a_prompt_that_is_refused_comes_back_as_a_failure(llm: Engine) -> None:
    results = list(llm.generate_many(["", ASK], SHORT))
    assert sorted((one.index, isinstance(one, Failure)) for one in results) == [(0, True), (1, False)]


@pytest.mark.parametrize("prompt", ["half \ud83d", "bytes \udcff", [{"role": "user", "content": "\ud83d"}]])
def test_what_is_not_text_is_refused_as_such(llm: Engine, prompt: Prompt) -> None:
    with pytest.raises(BadText, match="the prompt is not text"):
        llm.generate(prompt)
    (answer,) = llm.generate_many([prompt])
    assert isinstance(answer, Failure)
    assert answer.code == "bad_text"


def test_a_fresh_seed_is_drawn_and_reported(llm: Engine) -> None:
    first = llm.generate(ASK, SamplingParams(temperature=1.2, max_tokens=16))
    again = llm.generate(ASK, SamplingParams(temperature=1.2, max_tokens=16, seed=first.seed))
    assert again.text == first.text


def test_what_cannot_work_is_refused_with_the_numbers(llm: Engine) -> None:
    with pytest.raises(EmptyPrompt):
        llm.generate("")
    with pytest.raises(ContextLengthExceeded, match=r"3,000 tokens, the context is 2,048"):
        llm.generate([5] * 3000)
    with pytest.raises(ContextLengthExceeded, match="9,999"):
        specexec.load("demo", ctx=9999)


def test_a_folder_that_is_no_model_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match=r"config\.json is missing"):
        specexec.load(str(tmp_path))


def test_an_architecture_without_trees_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "load", lambda *_, **__: pytest.fail("weights were read"))
    shutil.copytree(demo_folder("target"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(UnsupportedArchitecture, match="dynamic RoPE"):
        specexec.load(str(tmp_path), drafter="ngram")  # what is asked for; auto would decode plainly
