"""The names of drafters are read in one place, and what cannot be is refused."""

import logging

import pytest

import specexec
from offload.hub import names
from specexec import SamplingParams
from specexec.compose.drafter_factory import join
from specexec.drafters.cost import CostModel
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.registry import REGISTRY, DrafterChoice, parse
from specexec.drafters.union import Union
from specexec.errors import BadDrafter


def nothing(name: str) -> bool:
    """A machine without folders and short names."""
    return False


@pytest.mark.parametrize(
    ("text", "sources", "models"),
    [
        ("none", (), ()),
        ("sibling", ("sibling",), ("sibling",)),
        ("ngram", ("ngram",), ()),
        ("sibling+ngram", ("sibling", "ngram"), ("sibling",)),
        ("ngram+sibling", ("sibling", "ngram"), ("sibling",)),
        ("./small", ("./small",), ("./small",)),
        ("./ngram", ("./ngram",), ("./ngram",)),
        ("org/small+ngram", ("org/small", "ngram"), ("org/small",)),
        ("substitute+ngram", ("substitute", "ngram"), ()),
        ("sibling+./small", ("sibling", "./small"), ("sibling", "./small")),
        ("./small+sibling", ("./small", "sibling"), ("./small", "sibling")),
        ("ngram+b/y+skip+a/x", ("b/y", "a/x", "skip", "ngram"), ("b/y", "a/x")),
    ],
)
def test_names_are_read_as_people_mean_them(text: str, sources: tuple[str, ...], models: tuple[str, ...]) -> None:
    choice = parse(text, nothing)
    assert choice == DrafterChoice(sources)
    assert choice.models == models
    assert parse(choice.name, nothing) == choice, "what was read is typed so"


def test_auto_looks_for_a_sibling() -> None:
    assert parse("auto", nothing).models == (names.PAIRED,)


@pytest.mark.parametrize("text", ["none+ngram", "auto+ngram", "none+./small", "auto+./small", "ngram+", ""])
def test_what_cannot_be_joined_is_refused(text: str) -> None:
    with pytest.raises(BadDrafter, match="cannot be joined"):
        parse(text, nothing)


@pytest.mark.parametrize(
    ("text", "twice"), [("./a+ngram+./a", "./a"), ("sibling+sibling", "sibling"), ("ngram+ngram", "ngram")]
)
def test_a_name_that_is_there_twice_is_refused(text: str, twice: str) -> None:
    with pytest.raises(BadDrafter, match=f"names {twice} twice"):
        parse(text, nothing)


@pytest.mark.parametrize(
    ("text", "meant"), [("ngrm", "ngram"), ("siblings+ngram", "sibling"), ("sibling+subsitute", "substitute")]
)
def test_a_misspelt_source_is_not_taken_for_a_model(text: str, meant: str) -> None:
    with pytest.raises(BadDrafter, match="is none of sibling") as refused:
        parse(text, nothing)
    assert str(refused.value.hint).startswith(meant)


def test_a_model_may_be_called_nearly_like_a_source() -> None:
    assert parse("ngrams+ngram", {"ngrams"}.__contains__) == DrafterChoice(("ngrams", "ngram"))


def test_one_source_stands_alone_and_several_are_joined() -> None:
    makers = dict.fromkeys(REGISTRY, NgramDrafter)

    def drafter(text: str) -> Drafter:
        return join(parse(text, nothing), {**makers}, CostModel())

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
