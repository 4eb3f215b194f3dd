"""The drafter itself drafted for: the tree of before in fewer passes, whatever guessed what it would be asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specexec
from specexec.drafters.cascade import Cascade
from specexec.drafters.cost import CostModel
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Ask
from specexec.drafters.ranking import Ranking
from specexec.drafters.read_rows import NOTHING
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.retrieval.suffix_index import LONGEST, RUNGS, Recent, context_of, follower
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.union import Union
from specexec.engine.decoder import Decoder
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import FixedBudget
from specexec.sampling.params import SamplingParams
from specexec.sizes import ALONG, BEAMS, drafter_rows
from specexec.tree.tree import ROOT, TokenTree
from tests.tiny import VOCABULARY, tiny
from tests.writing import prompt, sequence_of, write

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=24)
PROMPT = prompt(17, seed=3)


class Models:
    """A target and a drafter that is the same model, slightly off."""

    def __init__(self, folder: Path) -> None:
        self.target = TreeLM(tiny("llama", folder / "target"))
        model = tiny("llama", folder / "draft")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        self.draft = TreeLM(model)
        self.text = write(self.draft, NoDrafter(), [PROMPT], GREEDY)[0].tokens  # what the drafter will say

    def drafter(self, longest: int, memory: Memory, ranking: Ranking | None = None) -> SiblingDrafter:
        return SiblingDrafter(self.draft, VOCABULARY, ranking, cascade=Cascade(memory, longest))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return made(tmp_path_factory.mktemp("models"))


@cache
def made(folder: Path) -> Models:
    return Models(folder)


def free_rows(cascade: Cascade) -> None:
    """A pass costs a second, whatever it reads."""
    for rows in (1, 100):
        cascade.price.learn(rows, 1.0)


def memory_of(*texts: list[int]) -> Memory:
    memory = Memory()
    for text in texts:
        memory.recent.extend(text)
    return memory


@contextmanager
def passes(lm: TreeLM) -> Iterator[list[int]]:
    """The rows of every pass of a model meanwhile."""
    rows, forward = [], lm.forward

    def counted(parts: list[Rows], cancelled: None = None) -> list[torch.Tensor]:
        rows.append(sum(len(part.tokens) for part in parts))
        return forward(parts, cancelled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "forward", counted)
        yield rows


def spelled(tree: TokenTree) -> dict[tuple[int, ...], float]:
    return {tree.spelled(node): float(tree.reach_N[node]) for node in range(len(tree))}


@settings(max_examples=8)
@given(data=st.data())
def test_the_tree_is_the_same_whatever_guesses_what_is_asked(models: Models, data: st.DataObject) -> None:
    """Same nodes, same reach as without reading along, be the chains right, wrong, or right for a while."""
    sampling = data.draw(st.sampled_from([GREEDY, SAMPLED]))
    tau = data.draw(st.sampled_from([0.01, 0.05, 0.2]))  # the smaller, the deeper the tree
    budget = data.draw(st.integers(1, 80))
    end = data.draw(st.integers(1, len(models.text) - 4))
    noise = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)
    known = data.draw(st.integers(end - 1, len(models.text)))
    memory = memory_of([*models.text[:known], *data.draw(noise)], data.draw(noise))
    trees = []
    for longest in (0, data.draw(st.integers(1, 16))):
        sequence = sequence_of(models.text[:end], sampling)
        drafter = models.drafter(longest, memory, Ranking(tau))
        free_rows(drafter.cascade)  # rows cost nothing: long chains
        (tree,) = BestFirst().grow(drafter, [sequence], FixedBudget(budget), CostModel())
        trees.append(spelled(tree))
    assert trees[0].keys() == trees[1].keys()
    assert all(trees[1][path] == pytest.approx(reach, abs=2e-5 / tau) for path, reach in trees[0].items())


def test_right_chains_save_most_passes_and_wrong_ones_cost_none(models: Models) -> None:
    def taken(longest: int, memory: Memory) -> int:
        drafter = models.drafter(longest, memory, Ranking(tau=0.01))
        with passes(models.draft) as rows:
            BestFirst().grow(drafter, [sequence_of(PROMPT, GREEDY)], FixedBudget(24), CostModel())
        return len(rows)

    plain = taken(0, Memory())
    assert taken(16, memory_of(models.text)) < plain / 2
    assert taken(16, memory_of([*PROMPT, *prompt(40, seed=8)])) <= plain


def test_a_large_tree_grows_in_fewer_passes_and_is_the_same(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what memory has room for goes through the head at a time, however many nodes were read together."""
    trees, took, headed, head = [], [], list[int](), models.draft.head

    def counted(hidden_RH: torch.Tensor) -> torch.Tensor:
        headed.append(len(hidden_RH))
        return head(hidden_RH)

    monkeypatch.setattr(models.draft, "head", counted)
    for planner in (BestFirst(beams=BEAMS), BestFirst()):
        drafter, sequence = models.drafter(0, Memory(), Ranking(tau=1.0)), sequence_of(PROMPT, GREEDY)
        sequence.most_nodes = 4096
        with passes(models.draft) as rows:
            (tree,) = planner.grow(drafter, [sequence], FixedBudget(4096), CostModel())
        trees.append(spelled(tree))
        took.append(len(rows))
    assert len(trees[0]) == 4096
    assert trees[0].keys() == trees[1].keys()
    assert all(trees[1][path] == pytest.approx(reach, abs=2e-5) for path, reach in trees[0].items())
    assert took[1] < 0.7 * took[0]
    assert max(headed) == BEAMS


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_are_those_of_plain_decoding(models: Models, sampling: SamplingParams, overlap: bool) -> None:
    prompts = [PROMPT, [*PROMPT, *PROMPT]]
    plain = [one.tokens for one in write(models.target, models.drafter(0, Memory()), prompts, sampling, 0)]
    wrong = memory_of(prompt(300, seed=4, most=6))
    joined = Union([models.drafter(16, wrong), NgramDrafter(wrong)])
    for drafter in (models.drafter(16, memory_of(models.text)), joined):
        written = write(models.target, drafter, prompts, sampling, 20, overlap=overlap)
        assert [one.tokens for one in written] == plain


def test_a_wrong_chain_leaves_nothing_in_the_cache(models: Models) -> None:
    """After every sweep the drafter's cache holds rows of the text and of asked nodes, as if read alone."""
    memory = memory_of([*models.text[:30], *prompt(40, seed=6)], prompt(300, seed=4, most=6))
    drafter = models.drafter(16, memory)
    decoder, sequence = Decoder(models.target, drafter, BestFirst(), 12), sequence_of(PROMPT, SAMPLED)
    decoder.join(sequence)
    missed = 0
    while decoder.live:
        decoder.step()
        kept = sequence.cache(models.draft)
        below = drafter._below.get(sequence)
        assert len(kept.parents) == (0 if below is None else int((below.rows_N != NOTHING).sum()))
        assert below is None or not (below.along or below.waiting_R.any())
        missed += drafter.cascade._hits.seen_RC.sum() > drafter.cascade._hits.hit_RC.sum()
    fresh = KVCache()
    models.draft.forward([Rows(fresh, kept.tokens, range(-1, len(kept) - 1))])
    fresh.commit(range(len(kept)))
    assert missed
    for ours, theirs in zip(kept.layers.values(), fresh.layers.values(), strict=True):
        assert torch.allclose(ours.keys_HRD[:, : len(kept)], theirs.keys_HRD[:, : len(kept)], atol=1e-4)
        assert torch.allclose(ours.values_HRD[:, : len(kept)], theirs.values_HRD[:, : len(kept)], atol=1e-4)


def test_rows_that_were_not_asked_about_fit_the_memory_that_was_counted(models: Models) -> None:
    memory = memory_of(prompt(3000, seed=4, most=VOCABULARY))
    drafter = models.drafter(16, memory)
    free_rows(drafter.cascade)
    sequence = sequence_of(PROMPT, GREEDY)
    sequence.most_nodes = 40
    with passes(models.draft) as rows:
        BestFirst().grow(drafter, [sequence], FixedBudget(40), CostModel())
    assert max(rows[1:]) > sequence.growth.asked / len(rows)
    assert 0 < len(drafter._below[sequence].along) <= ALONG
    assert len(sequence.cache(models.draft).parents) - len(PROMPT) <= drafter_rows(40)


def test_dear_rows_are_read_for_good_evidence_only() -> None:
    """The same text asks for chains where a pass costs by rows, and where it costs by itself."""
    text = prompt(60, seed=1)
    ask = Ask(sequence_of([*text, *text[:20]], GREEDY), TokenTree.empty(), [ROOT])

    def chain(base_s: float, row_s: float, wrong: int = 0) -> int:
        cascade = Cascade()
        for rows in (1, 50):
            cascade.price.learn(rows, base_s + row_s * rows)
        links = cascade.chains(ask, [ROOT], 40, 0).get(ROOT, [])
        if wrong:
            cascade.count([link.cell for link in links] * wrong, False, False)
            links = cascade.chains(ask, [ROOT], 40, 0).get(ROOT, [])
        assert [link.token for link in links] == text[20 : 20 + len(links)]
        return len(links)

    assert chain(1.0, 0.0) == 16
    assert chain(0.0, 1.0) == 0
    assert 0 < chain(1.0, 1.0) < 8
    assert chain(1.0, 0.2, wrong=50) == 0


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=2, max_size=2), st.lists(st.integers(0, 3), max_size=16)
)
def test_the_follower_is_the_first_of_the_longest_match(texts: list[list[int]], ending: list[int]) -> None:
    stores = [Recent(), Recent()]
    for store, text in zip(stores, texts, strict=True):
        store.extend(text)
    context = context_of(ending)
    assert len(context) == LONGEST
    matches = [match for store in stores for match in store.matches(context)[:1]]
    best = max(matches, key=lambda match: match.rung, default=None)  # the first of equals
    found = follower(stores, context)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert (found.rung, found.token) == (best.rung, best.followers[0][0])
    for least in range(len(RUNGS)):
        assert follower(stores, context, least) == (found if found is not None and found.rung >= least else None)


def test_copying_takes_fewer_passes_with_the_built_in_pair() -> None:
    with specexec.load("demo", drafter="sibling", offload="none", dtype="f32", budget=32) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=32)
        asked = llm.encode("Write down the names of the months, one on each line.")
        again = [*asked, *llm.generate(asked, sampling).tokens, *asked]
        taken, texts = [], []
        for longest in (0, 16):
            draft = llm._drafts["drafter"]
            llm._decoder.drafter = SiblingDrafter(draft, len(llm.tokenizer), cascade=Cascade(longest=longest))
            with passes(draft) as rows:
                texts.append(llm.generate(again, sampling).tokens)
            taken.append(len(rows))
        assert texts[0] == texts[1]
        assert taken[1] < 0.7 * taken[0]
