"""The names of drafters are read in one place, and what cannot be is refused."""

import logging

import pytest

import specexec
from specexec import SamplingParams
from specexec.cost import CostModel
from specexec.drafters import Drafter
from specexec.drafters.choice import SOURCES, Choice, join, parse
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.union import Union
from specexec.errors import BadDrafter


@pytest.mark.parametrize(
    ("text", "choice", "pairing"),
    [
        ("none", Choice(()), "none"),
        ("sibling", Choice(("sibling",)), "auto"),
        ("ngram", Choice(("ngram",)), "none"),
        ("sibling+ngram", Choice(("sibling", "ngram")), "auto"),
        ("ngram+sibling", Choice(("sibling", "ngram")), "auto"),
        ("./small", Choice(("sibling",), "./small"), "./small"),
        ("./ngram", Choice(("sibling",), "./ngram"), "./ngram"),
        ("org/small+ngram", Choice(("sibling", "ngram"), "org/small"), "org/small"),
        ("substitute+ngram", Choice(("substitute", "ngram")), "none"),
    ],
)
def test_names_are_read_as_people_mean_them(text: str, choice: Choice, pairing: str) -> None:
    assert parse(text) == choice
    assert parse(text).pairing == pairing


def test_auto_looks_for_a_sibling() -> None:
    assert parse("auto").pairing == "auto"


@pytest.mark.parametrize("text", ["none+ngram", "auto+ngram", "a/b+c/d", "sibling+./small", "ngram+", ""])
def test_what_cannot_be_joined_is_refused(text: str) -> None:
    with pytest.raises(BadDrafter):
        parse(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("ngrm", "ngram"), ("siblings+ngram", "sibling"), ("sibling+subsitute", "substitute")]
)
def test_a_misspelt_source_is_not_taken_for_a_model(text: str, meant: str) -> None:
    with pytest.raises(BadDrafter, match="is none of sibling") as refused:
        parse(text)
    assert str(refused.value.hint).startswith(meant)


def test_one_source_stands_alone_and_several_are_joined() -> None:
    makers = dict.fromkeys(SOURCES, NgramDrafter)

    def drafter(text: str) -> Drafter:
        return join(parse(text), {**makers}, CostModel())

    assert isinstance(drafter("none"), NoDrafter)
    assert isinstance(drafter("ngram"), NgramDrafter)
    joined = drafter("sibling+ngram")
    assert isinstance(joined, Union)
    assert joined.name == "ngram+ngram"


def test_the_demo_writes_the_same_with_every_source(caplog: pytest.LogCaptureFixture) -> None:
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=24)
    texts = {}
    for drafter in ("none", "ngram", "sibling+ngram"):
        with specexec.load("demo", drafter=drafter, offload="none", dtype="f32", budget=16) as llm:
            texts[drafter] = llm.generate("The with statement", sampling).tokens
    assert len(set(texts.values())) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
