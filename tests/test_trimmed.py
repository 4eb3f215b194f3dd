"""A drafter with a cut head: the text stays, what is met can be guessed, and the head shrinks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import specexec
from specexec import SamplingParams
from specexec.drafters.ranking import Ranking
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.retrieval.suffix_index import Settled
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.trimmed_head import Columns, TrimmedHead, widened
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.noise import Noise
from tests.tiny import VOCABULARY, tiny
from tests.writing import plain_texts, prompt, samplings, sequence_of, write

LENGTH = 10
SAMPLINGS = [
    *samplings(LENGTH),
    SamplingParams(temperature=0.7, repetition_penalty=1.3, logit_bias=((7, 2.0),), seed=2, max_tokens=LENGTH),
]


class Case:
    """A target, and itself once more to draft for it; their own code caps the logits."""

    def __init__(self, folder: Path) -> None:
        self.target = TreeLM(tiny("gemma2", folder))
        self.again = TreeLM(tiny("gemma2", folder))

    def head(self, most: int, always: list[int] | None = None) -> TrimmedHead:
        return TrimmedHead(self.again, VOCABULARY, most, always or [])

    def drafter(self, head: TrimmedHead, tau: float | None = None) -> SiblingDrafter:
        return SiblingDrafter(self.again, VOCABULARY, Ranking(tau=tau), trimmed=head)

    def plain(self, prompts: list[list[int]], sampling: SamplingParams) -> list[list[int]]:
        return plain_texts(self.target, prompts, sampling)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("model"))
    yield case
    case.target.close()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalised"])
def test_the_text_is_that_of_plain_decoding(case: Case, sampling: SamplingParams) -> None:
    prompts = [prompt(9), prompt(30, seed=3)]
    plain = case.plain(prompts, sampling)
    for most in (1, 64):
        sequences = write(case.target, case.drafter(case.head(most)), prompts, sampling, 20)
        assert [one.answer for one in sequences] == plain, most


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt_neox", "opt"])
def test_its_logits_are_those_of_the_whole_head(family: str, tmp_path: Path) -> None:
    lm = TreeLM(tiny(family, tmp_path))
    head = TrimmedHead(lm, VOCABULARY, 8, always=[250])
    hidden_NH = torch.randn(5, lm.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for text in ([100, 101], [102], list(range(30, 60)), [9]):  # chosen, added to, chosen anew
        head.meet(text)
        assert {*text, 250} <= set(head.ids_S.tolist())
        assert len(set(head.ids_S.tolist())) == len(head.ids_S)
        torch.testing.assert_close(head.logits(hidden_NH), lm.head(hidden_NH)[:, head.ids_S])
        assert widened(head.logits(hidden_NH), head.ids_S, head._vocabulary).isfinite().sum() == 5 * len(head.ids_S)
    lm.close()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_perfect_drafter_whose_words_are_known_is_accepted_whole(case: Case, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=24)
    (answer,) = case.plain([prompt(9)], sampling)
    head = case.head(4, always=answer)
    decoder = Decoder(case.target, case.drafter(head, tau=0.01), BestFirst(), 9)
    decoder.join(sequence_of(prompt(9), sampling))
    (first,), (second,) = decoder.step(), decoder.step()
    assert [first.burst.accepted, second.burst.accepted] == [9, 9]
    assert len(head.ids_S) < VOCABULARY / 3


def test_what_the_target_and_the_corpus_use_is_chosen(case: Case) -> None:
    memory = Memory(corpus=Settled.of([[200, 201, 200, 201, 202]]))
    head = TrimmedHead(case.again, VOCABULARY, 3, memory=memory)
    head.count([90, 90, 91])
    head.meet([])
    assert set(head.ids_S.tolist()) == {90, 200, 201}
    again = case.head(2)
    again.unpack({"chosen": head.pack()})
    again.meet([])
    assert set(again.ids_S.tolist()) == {90, 91}
    with pytest.raises(ValueError, match="does not have"):
        again.unpack({"chosen": torch.tensor([[VOCABULARY], [1]]).numpy()})


def test_the_noise_of_some_tokens_is_theirs() -> None:
    noise, ids = Noise(3, VOCABULARY), torch.tensor([9, 4])
    assert torch.equal(Columns(noise, ids).rows([5]), noise.row(5)[ids][None])


def test_the_demo_writes_the_same_with_a_quarter_of_the_words() -> None:
    sampling = SamplingParams(temperature=0.8, seed=4, max_tokens=24)
    with specexec.load(drafter="sibling", budget=16, dtype="f32") as llm:
        whole = llm.generate("What is a tree?", sampling)
    with specexec.load(drafter="sibling", draft_vocab=1024, budget=16, dtype="f32") as llm:
        cut = llm.generate("What is a tree?", sampling)
        assert any(name.endswith("chosen") for name in llm.pack())
    assert cut.tokens == whole.tokens
    assert cut.accepted > 0


@pytest.mark.parametrize("name", ["none", "ngram"])
def test_without_a_drafter_model_it_is_refused(name: str) -> None:
    with pytest.raises(BadDrafter, match="trims the head"):
        specexec.load(drafter=name, draft_vocab=1024)


def test_a_head_from_which_nothing_is_left_out_is_refused() -> None:
    with pytest.raises(BadDrafter, match="999999 leaves nothing out") as refused:
        specexec.load(drafter="sibling", draft_vocab=999_999)
    assert "--draft-vocab" in str(refused.value.hint)
