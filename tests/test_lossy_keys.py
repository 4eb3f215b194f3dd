"""Of a long prompt's keys and values a part stays: what is written then, as transformers finds it behind a mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import specexec
from cli.engine.prefix_store import PrefixStore
from offload.machine.host_rows import HostCarrier
from specexec.compose.load_options import LoadOptions
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder, whole
from specexec.errors import BadDrafter, ContextLengthExceeded, UnsupportedArchitecture
from specexec.lossy import keys, prompts
from specexec.lossy.keys import last_rows
from specexec.lossy.prompts import FIRST, LOOKING, NEIGHBOURS, looked_at
from specexec.model.architecture import Index, LayerKind
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Travel
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.text.sequence import Sequence
from tests.tiny import LAYERS, VOCABULARY, WINDOW, greedy, tiny
from tests.writing import prompt, sequence_of

LONG = 300
KEPT = sorted({*range(4), *range(7, LONG, 5), *range(LONG - WINDOW, LONG)})
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def write(lm: TreeLM, drafter: SiblingDrafter, thin: Callable[[Sequence], list[int]], budget: int = 16) -> Decoder:
    """A long text of which rows are left out, beside a short one."""
    decoder = Decoder(lm, drafter, BestFirst(), budget, thin=thin, overlap=False)
    for tokens in (prompt(LONG), prompt(30, 1)):
        decoder.join(sequence_of(tokens, GREEDY))
    return decoder


def texts(decoder: Decoder) -> list[Sequence]:
    live = [*decoder.live]
    while decoder.live:
        decoder.step()
    return live


@pytest.mark.parametrize(("family", "away"), [("llama", False), ("gemma3_text", True)])
def test_what_is_written_sees_the_rows_that_stayed(family: str, away: bool, tmp_path: Path) -> None:
    travel = Travel(frozenset(range(LAYERS)), HostCarrier()) if away else None
    lm = TreeLM(tiny(family, tmp_path / "lm"), travel=travel)
    drafter = SiblingDrafter(TreeLM(tiny(family, tmp_path / "drafter")), VOCABULARY, Ranking(shared_noise=False))

    def thin(sequence: Sequence) -> list[int]:
        return KEPT if sequence.prompt_length == LONG else []

    found, short = texts(write(lm, drafter, thin))
    exact, same = texts(write(lm, drafter, whole))
    assert short.tokens == same.tokens
    assert found.tokens != exact.tokens, "the mask below says something"
    assert (found.kv_dropped, short.kv_dropped) == (LONG - len(KEPT), 0)
    assert lm in found.caches
    assert found.caches[lm].size_B < exact.caches[lm].size_B

    rows = len(found.tokens) - 1
    at_R = torch.arange(rows)
    hidden_QK = at_R[None] > at_R[:, None]
    gone_K = torch.ones(rows, dtype=torch.bool)
    gone_K[[*KEPT, *range(LONG, rows)]] = False
    masks = {
        "full_attention": hidden_QK | ((at_R >= LONG)[:, None] & gone_K),
        "sliding_attention": hidden_QK | (at_R[:, None] - at_R[None] >= WINDOW),
    }
    added = {name: torch.where(mask_QK, -torch.inf, 0.0)[None, None] for name, mask_QK in masks.items()}
    truth = tiny(family, tmp_path / "truth")
    truth.set_attn_implementation("eager")
    with torch.no_grad():
        seen = added["full_attention"] if family == "llama" else added
        logits_RV = truth(torch.tensor([found.tokens[:-1]]), attention_mask=seen).logits[0]
    assert logits_RV[LONG - 1 :].argmax(-1).tolist() == found.answer


def test_no_other_text_begins_with_what_stayed(tmp_path: Path) -> None:
    lm, tokens = TreeLM(tiny("llama", tmp_path)), prompt(60)
    cache = KVCache()
    cache.begin(tokens, 50)
    lm.forward([Rows.text(cache, tokens)])
    cache.commit(range(60))
    cache.thin([*range(4), *range(40, 50)], 50)
    assert (cache.rows, cache.position, len(cache)) == (24, 60, 60)
    cache.begin(tokens, 50)
    assert len(cache) == 60, "it is this text"
    assert [cache.reusable(length) for length in (4, 50, 60)] == [0, 0, 0]
    assert len(cache.prefix(60)) == 0
    cache.begin(tokens[:55], 50)
    assert (len(cache), cache.rows) == (55, 19), "a text may be written anew from the middle"
    cache.begin([*tokens, 1], 55)
    assert (len(cache), cache.rows, cache.dropped, cache.thinned) == (0, 0, 0, 0)


def test_what_the_drafter_writes_looks_too(tmp_path: Path) -> None:
    tokens, truth = prompt(LONG), tiny("llama", tmp_path / "truth")
    truth.set_attn_implementation("eager")
    text = greedy(truth, torch.tensor([tokens]), 4)[0].tolist()
    with torch.no_grad():
        attended = truth(torch.tensor([text]), output_attentions=True).attentions
    looking = torch.stack([layer_BHQR[0, :, -LOOKING - 4 :, :LONG].mean(1).amax(0) for layer_BHQR in attended]).amax(0)
    expected_R = [max(looking[max(at - NEIGHBOURS, 0) : at + NEIGHBOURS + 1].tolist()) for at in range(LONG)]
    lm, cache = TreeLM(tiny("llama", tmp_path / "lm")), KVCache()
    for _ in range(2):  # what the cache holds already is not read again
        torch.testing.assert_close(looked_at(lm, tokens, 4, (), cache), torch.tensor(expected_R), rtol=1e-4, atol=1e-6)
    assert cache.tokens == text
    first = cache.tokens[LONG]
    looked_at(lm, tokens, 4, {first}, cache)
    assert len(cache) == LONG, "the end of a text is not read"


def test_a_text_depends_on_its_prompt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WHOLE", 96)
    monkeypatch.setattr(keys, "AHEAD", 4)
    tokens = prompt(200)
    with specexec.load("demo", dtype="f32", lossy=("kv=0.4",)) as llm:
        llm.prefixes = store = PrefixStore.of(llm, tmp_path / "kept")
        found = llm.generate(tokens, GREEDY)
        assert (found.kv_dropped, found.unread, found.prompt_tokens, llm.lossy) == (104, 0, 200, ("kv=0.4",))
        assert store.known(tokens) == 0, "what stayed is no beginning of another text"
        along = torch.cat([*llm.log_probs_along(tokens, found.tokens, GREEDY)])
        assert along.argmax(-1).tolist() == [*found.tokens]
        short = llm.generate(tokens[:90], GREEDY)
        assert short.kv_dropped == 0
        caches: dict[object, KVCache] = {}
        answer = [token for burst in llm.stream(tokens, GREEDY, caches) for token in burst.tokens]
        bursts = [*llm.stream(tokens, GREEDY, caches, written=answer[:-3])]
        assert [token for burst in bursts for token in burst.tokens] == answer[-3:]
        assert bursts[-1].kv_dropped == 104
        longer = [*tokens, *answer, *prompt(10, 1)]
        went_on = [token for burst in llm.stream(longer, GREEDY, caches) for token in burst.tokens]
        assert went_on == [*llm.generate(longer, GREEDY).tokens]
        with pytest.raises(ContextLengthExceeded):
            llm.generate(prompt(2100), GREEDY)
    with specexec.load("demo", dtype="f32", budget=0, kv="disk", lossy=("kv=0.4",)) as llm:
        assert llm.generate(tokens, GREEDY).tokens == found.tokens
    with specexec.load("demo", dtype="f32", drafter="none") as exact:
        assert exact.generate(tokens[:90], GREEDY).tokens == short.tokens
        text = exact.generate(tokens, GREEDY).tokens
    with specexec.load("demo", dtype="f32", lossy=("kv=1",)) as llm:
        all_of_it = llm.generate(tokens, GREEDY)
        assert (all_of_it.tokens, all_of_it.kv_dropped) == (text, 0)


@pytest.mark.parametrize("drafter", ["none", "ngram", "substitute"])
def test_without_a_model_that_looks_it_is_refused(drafter: str) -> None:
    with pytest.raises(BadDrafter, match="kv=X lets a drafter model look at prompts, and none drafts here"):
        specexec.load("demo", drafter=drafter, lossy=("kv=0.4",))


def test_a_window_hides_what_it_looks_at() -> None:
    with pytest.raises(BadDrafter, match="--draft-window hides from the drafter what --lossy kv=X lets it see"):
        specexec.load("demo", LoadOptions(draft_window=64, lossy=("kv=0.4",)))


def test_what_layers_with_a_window_see_stays() -> None:
    assert last_rows([LayerKind(), LayerKind(attends=False, recurrent=True)]) == LOOKING > FIRST
    assert last_rows([LayerKind(window=512), LayerKind(), LayerKind(chunk=1024)]) == 1024
    with pytest.raises(UnsupportedArchitecture, match="no layer of this model sees all of one"):
        last_rows([LayerKind(window=512), LayerKind(attends=False, recurrent=True)])
    with pytest.raises(UnsupportedArchitecture, match="find them by their places"):
        last_rows([LayerKind(), LayerKind(index=Index(heads=2, width=8, most=64))])
