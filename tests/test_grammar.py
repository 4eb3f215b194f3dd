"""A grammar takes tokens away and nothing else: the text is the one that plain decoding writes under the same mask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from llguidance import LLMatcher, LLParserLimits
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specexec
from specexec.engine.engine import Engine
from specexec.engine.request_types import Failure
from specexec.errors import BadGrammar, BadSampling
from specexec.sampling.grammar import Grammar, json_schema, regex
from specexec.sampling.json_schema import usable
from specexec.sampling.lark import lark
from specexec.sampling.params import SamplingParams
from specexec.stats import Completion

QUESTION = [{"role": "user", "content": "What are you?"}]
WORDS = [f"{size} {colour} {thing}" for size, colour, thing in product(
    ("big", "small", "Ünïcode"), ("red", "green", ""), ("list", "lists", "model.\n"))]  # fmt: skip
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DRAFTERS = [("none", 0), ("sibling", 1), ("sibling", 32), ("ngram", 16), ("sibling+ngram", 32)]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    found = {drafter: specexec.load("demo", drafter=drafter, dtype="f32") for drafter in dict(DRAFTERS)}
    yield found
    for engine in found.values():
        engine.close()


@pytest.fixture(scope="module")
def plain(engines: dict[str, Engine]) -> Engine:
    return engines["none"]


def one_of_words(engine: Engine) -> Grammar:
    return engine.grammar("start: " + " | ".join(json.dumps(word, ensure_ascii=False) for word in WORDS))


def written_by_transformers(model: PreTrainedModel, prompt: list[int], spelt: list[bytes], end: int) -> list[int]:
    """Greedy text whose bytes begin one of WORDS at every step; `end` once they are one. Knows no llguidance."""
    wanted = [word.encode() for word in WORDS]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        so_far = b"".join(spelt[token] for token in ids[len(prompt) :].tolist())
        going_on = [t for t, new in enumerate(spelt) if new and any(word.startswith(so_far + new) for word in wanted)]
        return [*going_on, *([end] if so_far in wanted else [])]

    with torch.no_grad():
        ids = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            max_new_tokens=40,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            eos_token_id=end,
        )
    return [int(token) for token in ids[0, len(prompt) :]]


def test_the_text_is_that_of_transformers_under_the_same_mask(engines: dict[str, Engine]) -> None:
    folder = engines["none"].folders["target"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alphabet = tokenizer.backend_tokenizer.pre_tokenizer  # byte-level: one printable character per byte
    assert "ByteLevel" in str(alphabet)
    characters = bytes_of_characters()
    spelt = [
        b"" if token in tokenizer.all_special_ids else bytes(characters[c] for c in text)
        for text, token in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ]
    prompt = engines["none"].encode(QUESTION)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = written_by_transformers(model, prompt, spelt, tokenizer.eos_token_id)
    assert len(expected) > 3
    for drafter, budget in DRAFTERS:
        engine = engines[drafter]
        engine.budget = budget
        greedy = SamplingParams(temperature=0.0, max_tokens=40, grammar=one_of_words(engine))
        assert list(engine.generate(prompt, greedy).tokens) == expected, (drafter, budget)


def bytes_of_characters() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.8, seed=4, top_p=0.9, top_k=20),
        SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.3, frequency_penalty=0.5),
    ],
    ids=["greedy", "sampled", "filtered", "penalised"],
)
def test_same_seed_same_json_whatever_the_drafter_the_budget_and_the_batch(
    engines: dict[str, Engine], sampling: SamplingParams
) -> None:
    texts = set()
    for drafter, budget in DRAFTERS[::2] if sampling.temperature else DRAFTERS:
        engine = engines[drafter]
        engine.budget = budget
        bound = replace(sampling, max_tokens=60, grammar=engine.grammar(json_schema(PERSON)))
        texts.add(engine.generate(QUESTION, bound).text)
    free = replace(sampling, max_tokens=20)
    for among in engine.generate_many([QUESTION, QUESTION, "List"], [free, bound, bound]):
        assert isinstance(among, Completion)
        if among.index == 1:
            texts.add(among.text)
    (text,) = texts
    person = json.loads(text)
    assert text == json.dumps(person, ensure_ascii=False)
    assert list(person) == ["name", "age", "tags"]
    assert 0 <= person["age"] <= 150
    assert len(person["name"]) <= 12
    assert set(person["tags"]) <= {"red", "green"}


def test_a_drafter_that_sees_the_grammar_is_believed_more_often(engines: dict[str, Engine]) -> None:
    engine = engines["sibling"]
    engine.budget = 8
    grammar = engine.grammar(json_schema(PERSON))
    done = engine.generate(QUESTION, SamplingParams(temperature=0.0, max_tokens=120, grammar=grammar))
    assert done.tokens_per_sweep > 2  # none of these texts is one that the toy would write by itself


def test_a_drafter_never_guesses_what_the_grammar_forbids(engines: dict[str, Engine]) -> None:
    for drafter in ("sibling", "ngram", "sibling+ngram"):
        engine = engines[drafter]
        engine.budget = 16
        grammar = engine.grammar(json_schema(PERSON))
        parse, guessed = grammar.start(), 0
        for burst in engine.stream(QUESTION, SamplingParams(temperature=1.0, seed=1, max_tokens=80, grammar=grammar)):
            for node in range(len(burst.tree)):
                *above, token = burst.tree.spelled(node)
                assert parse.allowed([tuple(above)], engine.tokenizer.vocab_size)[0, token], (drafter, node)
                guessed += 1
            parse.advance(burst.tokens)
        assert guessed


def test_an_answer_goes_on_in_the_middle_of_its_grammar(plain: Engine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=80, grammar=plain.grammar(json_schema(PERSON)))
    whole = plain.generate(QUESTION, sampling)
    begun = whole.tokens[:9]
    rest = [token for burst in plain.stream(QUESTION, sampling, written=begun) for token in burst.tokens]
    assert (*begun, *rest) == whole.tokens


def test_a_finished_grammar_ends_the_text(plain: Engine) -> None:
    done = plain.generate(QUESTION, SamplingParams(temperature=0.0, grammar=plain.grammar(regex("[0-9]{4}"))))
    assert (len(done.text), done.text.isdigit(), done.finish_reason) == (4, True, "stop")


def test_a_grammar_and_the_wish_never_to_end_exclude_each_other(plain: Engine) -> None:
    with pytest.raises(BadSampling, match="ignore_eos"):
        SamplingParams(grammar=plain.grammar(regex("a")), ignore_eos=True)


@pytest.mark.parametrize(
    "text",
    [json_schema({"type": "objekt"}), json_schema({"type": "array", "uniqueItems": True}), regex("(a"), "",
     "start: nothing", json_schema({"type": "string", "enum": [1]}), json_schema({"$ref": "#/nowhere"})],
)  # fmt: skip
def test_a_grammar_that_cannot_be_used_is_refused(plain: Engine, text: str) -> None:
    with pytest.raises(BadGrammar, match="the grammar cannot be used"):
        plain.grammar(text)


def test_a_grammar_that_nests_deeper_than_a_stack_leaves_the_process_alive(plain: Engine) -> None:
    def wrapped(inner: dict[str, object]) -> dict[str, object]:
        for _ in range(40):
            inner = {"items": inner}
        return inner

    defs = {f"a{at}": wrapped({"$ref": f"#/$defs/a{at + 1}"}) for at in range(50)} | {"a50": {"type": "string"}}
    schema: dict[str, object] = {"$ref": "#/$defs/a0", "$defs": defs}
    assert usable(schema).notes == []
    assert plain.grammar(json_schema(schema)).start().failure is None
    rules = (f'x{at}: {"(" * 25}x{at + 1} "b"{")" * 25} | "c"' for at in range(1000))
    deep = plain.grammar(lark("\n".join(["start: x0", *rules, 'x1000: "a"'])))
    assert deep.start().failure is None
    with pytest.raises(BadGrammar, match="100,000 are allowed"):
        lark("#" * 100_001)
    with pytest.raises(BadGrammar, match="nests too deep to be read"):
        lark(f"root ::= {'(' * 3000}'a'{')' * 3000}".replace("'", '"'))


def test_a_lenient_schema_passes_over_what_cannot_be_enforced(plain: Engine) -> None:
    assert plain.grammar(json_schema({"type": "array", "uniqueItems": True}, lenient=True))


@pytest.mark.parametrize("drafter", ["none", "sibling"])
def test_a_grammar_that_fails_on_the_way_ends_its_own_text_only(engines: dict[str, Engine], drafter: str) -> None:
    engine = engines[drafter]
    engine.budget = 8
    tight = LLParserLimits(step_lexer_fuel=1_000, step_max_items=5)
    matcher = LLMatcher(engine._intake._grammars._tokenizer, json_schema(PERSON), log_level=0, limits=tight)
    assert not matcher.is_error()
    doomed = SamplingParams(temperature=0.0, max_tokens=60, grammar=Grammar(matcher))
    free = SamplingParams(temperature=0.0, max_tokens=20)
    first, second = sorted(engine.generate_many([QUESTION, QUESTION], [free, doomed]), key=lambda one: one.index)
    assert isinstance(second, Failure)
    assert second.code == "bad_grammar"
    assert isinstance(first, Completion)
    assert first.text == engine.generate(QUESTION, free).text
    with pytest.raises(BadGrammar, match="too hard to follow"):
        list(engine.stream(QUESTION, doomed))
    assert engine.generate(QUESTION, free).text == first.text
