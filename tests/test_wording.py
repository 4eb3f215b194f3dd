"""Text between two tokenizers: by bytes, nothing added or lost, on all pairs of the real ones."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import pytest
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offload.hub.names import demo_folder
from specexec.drafters.translated import TranslatedDrafter
from specexec.errors import TokenizerMismatch
from specexec.model.tree_lm import TreeLM
from specexec.text.token_bytes import Wording, wording_of
from tests import real
from tests.tiny import tiny

TEXTS = (
    "She said: “It’s 1,234.50 € – naïve, isn’t it?”\n\nThen  two  blanks   and three.",
    " a leading blank,\n  two, and a trailing one ",
    "def f(x):\n\tif x > 1_000:\n        return {'a': [x ** 2, -1]}  # ok\r\n",
    "漢字かな交じり文。你好，世界！한국어 텍스트も。",
    "👩‍👩‍👧‍👦 🇩🇪 🌱x🏳️‍🌈",
    "     \n\n\n \t\t x",
    "Привет мир, שלום עולם, ไทย, हिन्दी",
    "a",
)
NAMES = (*real.TOKENIZERS, "smollm2")


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(real.model()) if name == "smollm2" else real.pretrained(name)


@functools.cache
def wording(name: str) -> Wording:
    return wording_of(tokenizer(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_there_and_back_whole_and_in_parts(name: str) -> None:
    one, chance = wording(name), random.Random(0)
    for text in (whole.encode() for whole in TEXTS):
        assert one.spelled(one.cut(text)) == text
        for at in (chance.randrange(len(text) + 1) for _ in range(4)):  # within characters too
            assert one.spelled(one.cut(text[:at])) + one.spelled(one.cut(text[at:])) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_tokens_are_those_of_the_text_they_were_made_of(name: str) -> None:
    """The truth is the tokenizer's own: what it made of a text, and how it reads its own tokens, one blank apart."""
    one, own = wording(name), tokenizer(name)
    for text in TEXTS:
        made = own(text, add_special_tokens=False)["input_ids"]
        spelled = one.spelled(made).decode()
        assert spelled.removeprefix(one.lead.decode()) == text.removeprefix(one.lead.decode())
        decoded = str(own.decode(made, clean_up_tokenization_spaces=False))
        assert decoded in (spelled, spelled.removeprefix(" "))
        for end in range(1, len(made)):
            assert one.spelled(made).startswith(one.spelled(made[:end]))


@pytest.mark.parametrize("name", NAMES)
def test_ids_that_the_tokenizer_does_not_know_are_no_text(name: str) -> None:
    assert wording(name).spelled([len(tokenizer(name)), 10**9, -1]) == b""


def test_leading_blanks_are_neither_dropped_nor_doubled() -> None:
    """llama2's encoder puts a blank before every text and its decoder drops one."""
    one = wording("llama2")
    assert one.lead == b" "
    assert [one.spelled([token]) for token in one.cut(b"  two words")] == [b" ", b" two", b" words"]
    assert one.spelled(one.cut(b"two")) == b"two"
    assert wording("gemma3").lead == b""


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TreeLM]:
    lm = TreeLM(tiny("llama", tmp_path_factory.mktemp("lm"), num_hidden_layers=1))
    yield lm
    lm.close()


@pytest.mark.parametrize("theirs", NAMES)
@pytest.mark.parametrize("ours", NAMES)
def test_every_pair_carries_text_and_guesses_over(lm: TreeLM, ours: str, theirs: str) -> None:
    from_, to = wording(ours), wording(theirs)
    drafter = TranslatedDrafter(lm, from_, to, "pair")
    for text in TEXTS:
        tokens = tokenizer(ours)(text)["input_ids"]
        carried = drafter._in_theirs(tokens)
        assert tuple(carried[: len(to.begin)]) == to.begin
        assert to.spelled(carried[len(to.begin) :]).removeprefix(to.lead) == text.encode().removeprefix(from_.lead)
        for their in to.cut(text.encode()):
            assert from_.spelled(drafter._piece(their)) == to.spelled([their])
    ended = drafter._in_theirs([*tokens, from_.end or 0])
    assert ended == [*carried, to.end]
    assert drafter._piece(to.end or 0) == (from_.end,)


def test_a_tokenizer_that_changes_text_is_refused_by_name() -> None:
    lower = AutoTokenizer.from_pretrained(demo_folder("drafter"))
    lower.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(TokenizerMismatch, match=r"^drafter \./small does not .* tokenizer changes text \(") as refused:
        wording_of(lower, "drafter ./small does not share the model's vocabulary, and its tokenizer")
    assert "--drafter none" in (refused.value.hint or "")


def test_a_tokenizer_that_pads_and_cuts_what_it_is_given_spells_alike() -> None:
    padding, plain = (AutoTokenizer.from_pretrained(demo_folder("drafter")) for _ in range(2))
    padding.backend_tokenizer.enable_padding(length=40)
    padding.backend_tokenizer.enable_truncation(3)
    text = b"a text of some words"
    assert wording_of(padding, "ours").cut(text) == wording_of(plain, "theirs").cut(text)
