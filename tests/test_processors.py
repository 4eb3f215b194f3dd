"""generation_config.json is followed: the processors and filters of transformers' own `generate`, on any history."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import specexec
from offload.hub.names import demo_folder
from specexec import Completion, Failure, SamplingParams
from specexec.sampling.filters import restrict
from specexec.sampling.model_defaults import _CALLERS, _IGNORED, _THEIR_NAMES, defaults_of
from specexec.sampling.processors import JudgedText, Processors, processed
from tests.tiny import VOCABULARY, tiny_config

ENDS = [2, 5]

# Fields of GenerationConfig that change which token comes next, as a file would hold them.
WISHES: dict[str, st.SearchStrategy[object]] = {
    "repetition_penalty": st.sampled_from([0.8, 1.05, 1.7]),
    "encoder_repetition_penalty": st.sampled_from([0.7, 1.3]),
    "no_repeat_ngram_size": st.integers(1, 4),
    "encoder_no_repeat_ngram_size": st.integers(1, 4),
    "bad_words_ids": st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=5),
    "sequence_bias": st.lists(
        st.tuples(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.floats(-8, 8)).map(list),
        min_size=1,
        max_size=5,
        unique_by=lambda pair: str(pair[0]),
    ),
    "min_length": st.integers(1, 14),
    "min_new_tokens": st.integers(1, 8),
    "forced_bos_token_id": st.integers(0, 7),  # transformers refuses to force what is suppressed
    "forced_eos_token_id": st.sampled_from([2, [7]]),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(0.5, 1.6)).map(list),
    "suppress_tokens": st.lists(st.integers(8, VOCABULARY + 9), min_size=1, max_size=40),
    "begin_suppress_tokens": st.lists(st.integers(0, 12), min_size=1, max_size=4),
    "temperature": st.sampled_from([0.6, 1.0, 1.8]),
    "top_k": st.integers(1, 60),
    "top_p": st.floats(0.3, 0.99),
    "min_p": st.floats(0.01, 0.3),
    "top_h": st.floats(0.2, 1.0),
    "typical_p": st.floats(0.2, 0.99),
    "epsilon_cutoff": st.floats(1e-3, 0.1),
    "eta_cutoff": st.floats(1e-3, 0.1),
    "renormalize_logits": st.just(True),
}


# Fields that choose no token of a single text: how long it may become is the caller's; how `generate` computes and what
# it returns; and what only beams and assistants read, which are named themselves.
WITHOUT_MEANING = {
    "max_length", "max_new_tokens", "pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "return_dict_in_generate", "num_return_sequences", "early_stopping",
    "length_penalty", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "_from_model_config",
    "max_matching_ngram_size", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "transformers_version",
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=1))


def theirs(model: PreTrainedModel, wishes: dict[str, object], prompt: list[int], longest: int) -> Callable[..., Tensor]:
    """The processors that `generate` would make of a file with these wishes."""
    config = GenerationConfig.from_dict({"eos_token_id": ENDS, "max_length": longest, "top_k": 0, **wishes})
    config._eos_token_tensor = torch.tensor(ENDS)
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + len(prompt)  # as _prepare_generated_length does
    make = cast("Callable[..., Callable[..., Tensor]]", model._get_logits_processor)
    return make(config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([prompt]), device="cpu")


@settings(max_examples=100)
@given(st.data())
def test_allowed_tokens_and_their_scores_are_those_of_generate(model: PreTrainedModel, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(WISHES)), max_size=6))
    wishes = {name: data.draw(WISHES[name]) for name in sorted(chosen)} | {"do_sample": True}
    prompt = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=9))
    answer = data.draw(st.lists(st.integers(0, 12), max_size=9))
    longest = len(prompt) + data.draw(st.integers(len(answer) + 1, 10))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    logits_1V = torch.randn(1, VOCABULARY, generator=generator) * 3

    expected = theirs(model, wishes, prompt, longest)(torch.tensor([[*prompt, *answer]]), logits_1V.clone())

    defaults = defaults_of(GenerationConfig.from_dict({"eos_token_id": ENDS, **wishes}))
    assert not defaults.ignored
    sampling = defaults.filled(SamplingParams())
    text = JudgedText(tuple(prompt), VOCABULARY, defaults.stop_tokens, longest)
    history = Processors(sampling, text).history(answer[:2]).after(answer[2:])
    ours = restrict(processed(logits_1V, [history]), sampling)

    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert sampling.temperature
    torch.testing.assert_close(torch.softmax(ours / sampling.temperature, -1), expected.softmax(-1))


# What is followed in whole texts. BAD is filled in with what the plain text holds.
GREEDY: list[dict[str, object]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    {"min_new_tokens": 23},
    {"exponential_decay_length_penalty": [3, 1.2]},
    {"forced_eos_token_id": 3, "max_new_tokens": 9},
    {"begin_suppress_tokens": list(range(20, 400)), "suppress_tokens": list(range(400, 2000))},
    {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_length": 30, "suppress_tokens": [17, 300, 301]},
]
PROMPT = "List the days of the week. What does specexec do? What does specexec"
LENGTH = 24


class Demo:
    """The built-in pair under transformers' own `generate` and under engines that draft in several ways."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(demo_folder("target"), dtype=torch.float32)
        ways = [("none", 0), ("sibling+ngram", 16)]
        self.known: dict[tuple[str, bool], list[int]] = {}
        self.engines = [specexec.load("demo", drafter=who, budget=nodes, dtype="f32") for who, nodes in ways]
        self.prompt = self.engines[0].encode(PROMPT)
        self.chat = self.engines[0].encode([{"role": "user", "content": "List the colours of the rainbow."}])

    def generated(self, wishes: dict[str, object], chat: bool = False) -> list[int]:
        """The answer of `generate`, greedy; asked for once."""
        key = json.dumps(wishes, sort_keys=True), chat
        if key not in self.known:
            self.known[key] = self._generate(wishes, chat)
        return self.known[key]

    def _generate(self, wishes: dict[str, object], chat: bool) -> list[int]:
        prompt = self.chat if chat else self.prompt
        config = GenerationConfig.from_dict({"max_new_tokens": LENGTH, "do_sample": False, **wishes})
        tokens = self.model.generate(torch.tensor([prompt]), generation_config=config)  # type: ignore[misc]
        return list(cast(Tensor, tokens)[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    found = Demo()
    yield found
    for engine in found.engines:
        engine.close()


def asked(wishes: dict[str, object], **more: object) -> SamplingParams:
    """The same wishes as a request states them."""
    wanted = defaults_of(GenerationConfig.from_dict(wishes)).filled(SamplingParams())
    length = wishes.get("max_new_tokens", LENGTH)
    return replace(wanted, max_tokens=length, **more)  # type: ignore[arg-type]  # values of their fields


@pytest.mark.parametrize("wishes", GREEDY, ids=lambda wishes: "+".join(wishes))
def test_greedy_text_is_that_of_generate_with_any_drafter(demo: Demo, wishes: dict[str, object]) -> None:
    expected = [demo.generated(wishes, chat) for chat in (False, True)]
    assert expected != [demo.generated({}, chat) for chat in (False, True)], "the wish changes the text"
    for engine in demo.engines:
        assert [list(engine.generate(p, asked(wishes)).tokens) for p in (demo.prompt, demo.chat)] == expected


def test_words_are_avoided_or_favoured_as_by_generate(demo: Demo) -> None:
    plain = demo.generated({})
    wishes = {"bad_words_ids": [plain[2:4], plain[9:10]], "sequence_bias": [[plain[12:15], -50.0], [[17, 30], 4.0]]}
    expected = demo.generated(wishes)
    assert expected != plain
    for engine in demo.engines:
        assert list(engine.generate(demo.prompt, asked(wishes)).tokens) == expected


SAMPLED: list[dict[str, object]] = [
    {"repetition_penalty": 1.2, "temperature": 0.7, "top_p": 0.9},
    {"no_repeat_ngram_size": 2, "temperature": 1.2, "top_k": 40, "min_p": 0.02},
    {"typical_p": 0.8, "top_h": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002, "min_new_tokens": 12},
    {"suppress_tokens": list(range(300, 900)), "encoder_repetition_penalty": 1.2, "temperature": 0.7},
]


@pytest.mark.parametrize("wishes", SAMPLED, ids=lambda wishes: "+".join(wishes))
def test_sampled_text_is_the_same_with_any_drafter_alone_and_together(demo: Demo, wishes: dict[str, object]) -> None:
    samplings = [asked({"do_sample": True, **wishes}, seed=seed) for seed in (1, 2)]
    plain, *drafting = demo.engines
    expected = [plain.generate(demo.prompt, sampling).tokens for sampling in samplings]
    for engine in drafting:
        together = engine.generate_many([demo.prompt] * len(samplings), samplings)
        assert {one.index: one.tokens for one in together if isinstance(one, Completion)} == dict(enumerate(expected))
    begun, rest = expected[0][:7], drafting[0].stream(demo.prompt, samplings[0], written=expected[0][:7])
    assert (*begun, *(token for burst in rest for token in burst.tokens)) == expected[0]


def with_wishes(folder: Path, **wishes: object) -> Path:
    """The demo target with more in its generation_config.json."""
    shutil.copytree(demo_folder("target"), folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wishes))
    return folder


def test_the_file_is_followed_and_the_user_goes_before_it(demo: Demo, tmp_path: Path) -> None:
    wishes: dict[str, object] = {"no_repeat_ngram_size": 2, "min_new_tokens": 23}
    expected = demo.generated(wishes, chat=True)
    text = demo.engines[0].decode(expected)
    folder = with_wishes(tmp_path / "model", stop_strings=text[30:36], **wishes)
    with specexec.load(str(folder), drafter="ngram", dtype="f32") as engine:
        bare = SamplingParams(max_tokens=LENGTH)
        followed = engine.generate(demo.chat, bare)
        assert list(followed.tokens) == expected[: len(followed.tokens)]
        assert (followed.text, followed.finish_reason) == (text[: text.index(text[30:36])], "stop")
        assert list(engine.generate(demo.chat, replace(bare, stop=())).tokens) == expected
        mine = replace(bare, stop=(), no_repeat_ngram_size=0, min_tokens=0)
        assert list(engine.generate(demo.chat, mine).tokens) == demo.generated({}, chat=True)


def test_what_generate_did_before_there_was_such_a_file_is_read_from_the_config(demo: Demo, tmp_path: Path) -> None:
    folder = with_wishes(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"no_repeat_ngram_size": 2}))
    with specexec.load(str(folder), drafter="none", dtype="f32") as engine:
        tokens = engine.generate(demo.prompt, SamplingParams(max_tokens=LENGTH)).tokens
    assert list(tokens) == demo.generated({"no_repeat_ngram_size": 2})


def test_what_cannot_be_followed_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = with_wishes(tmp_path / "model", num_beams=4, penalty_alpha=0.6, top_k=-1, prompt_lookup_num_tokens=3)
    with caplog.at_level("WARNING", logger="specexec"), specexec.load(str(folder), drafter="none"):
        pass
    told = [record.getMessage() for record in caplog.records if "generation_config.json" in record.getMessage()]
    assert len(told) == 2
    assert "top_k is -1" in told[0]
    assert "num_beams=4, penalty_alpha=0.6, prompt_lookup_num_tokens=3 is not followed" in told[1]


def test_no_field_of_the_file_is_passed_over() -> None:
    followed = {_THEIR_NAMES.get(one.name, one.name) for one in fields(SamplingParams)} - _CALLERS
    known = set(GenerationConfig().to_dict())
    assert known - followed - set(_IGNORED) - {"eos_token_id", "do_sample"} == WITHOUT_MEANING
    assert set(_IGNORED) <= known


def test_a_text_after_which_nothing_is_allowed_fails_by_name_and_alone(demo: Demo) -> None:
    rows = demo.model.config.vocab_size
    nothing = asked({"suppress_tokens": list(range(rows))})
    for engine in demo.engines:
        failed, done = sorted(
            engine.generate_many([demo.prompt, demo.prompt], [nothing, asked({})]), key=attrgetter("index")
        )
        assert isinstance(failed, Failure)
        assert isinstance(done, Completion)
        assert (failed.code, "no token may come next" in str(failed.error)) == ("bad_sampling", True)
        assert list(done.tokens) == demo.generated({})


def test_tokens_of_the_users_own_end_a_text(demo: Demo) -> None:
    plain = demo.generated({})
    for engine in demo.engines:
        answer = engine.generate(demo.prompt, asked({}, stop_token_ids=(plain[8],), ignore_eos=True))
        first = plain.index(plain[8])
        assert (list(answer.tokens), answer.finish_reason) == (plain[: first + 1], "stop")
        assert answer.text == engine.decode(plain[:first])
