"""A head that fills a block guesses a lattice: as its publisher computes it, and the text is the target's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config

import specexec
from cli.app import commands
from offload.hub.names import demo_folder
from specexec.drafters.heads.blocks import BlockFiller
from specexec.drafters.heads.dflash import BlockHead, DFlash, loaded
from specexec.drafters.heads.dflash_fields import DFlashFields
from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.lattice import LatticeDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Ask
from specexec.drafters.ranking import Named, Ranking
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import FixedBudget
from specexec.sampling.params import SamplingParams
from specexec.tree.tree import ROOT
from tests.tiny import tiny
from tests.writing import prompt, sequence_of, texts_are_plain, write

RECORDED = Path(__file__).parent / "data" / "heads"
VOCABULARY, HIDDEN, LAYERS = 96, 32, 4
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=16),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=16),
    SamplingParams(temperature=0.8, seed=2, max_tokens=16, repetition_penalty=1.3),
]
PROMPTS = [prompt(length, length, VOCABULARY - 1) for length in (21, 5, 13)]


def settings(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def target_of(folder: Path, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    return tiny(
        "llama", folder, vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        head_dim=8,
    )  # fmt: skip


def sizes(table_VH: Tensor) -> TargetSizes:
    return TargetSizes(HIDDEN, torch.device("cpu"), torch.float32, table_VH)


def head_of(name: str, table_VH: Tensor) -> BlockHead:
    folder = RECORDED / name
    return loaded(settings(folder), load_file(folder / "model.safetensors"), sizes(table_VH), name)


class Case:
    """A small target, and the recorded head for it, which was trained for nothing."""

    def __init__(self, folder: Path) -> None:
        model = target_of(folder)
        self.target = TreeLM(model)
        table_VH = model.get_input_embeddings().weight
        assert isinstance(table_VH, Tensor)
        self.table_VH = table_VH
        self.head = head_of("dflash", table_VH).dflash

    def drafter(
        self,
        head: BlockHead | None = None,
        ranking: Ranking | None = None,
        window: int | None = None,
        entries: int = VOCABULARY,
    ) -> LatticeDrafter:
        """Of a target whose tokenizer has so many entries."""
        head = head or BlockHead(self.head)
        named = Named(VOCABULARY, entries, (), self.target.device, head.ids)
        return LatticeDrafter(BlockFiller(head, self.target, window), named, ranking, following=head.following)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("target"))
    yield case
    case.target.close()


@pytest.mark.parametrize("name", ["dflash", "dflash_sliding"])
def test_its_block_is_what_its_package_computed(name: str) -> None:
    """In one piece and in two: what is kept of the text is the same."""
    recorded = load_file(RECORDED / name / "reference.safetensors")
    head, text = head_of(name, recorded["table"]).dflash, recorded["text"].tolist()
    for cut in (10, 4):
        cache = KVCache()
        head.read(cache, text[:cut], recorded["states"][:cut])
        if cut < 10:
            head.read(cache, text[cut:10], recorded["states"][cut:])
        hidden_PH = head.fill(cache, text[10])[1:]
        assert torch.allclose(hidden_PH, recorded["hidden"], atol=1e-5)
        logits_PV = head.shaped(hidden_PH @ recorded["head"].T)
        assert torch.allclose(logits_PV, recorded["logits"], atol=1e-4)


def filled(name: str) -> tuple[BlockHead, dict[str, Tensor], Tensor]:
    """A head, what was recorded, and the hidden states of its block behind the first eleven tokens of the text."""
    recorded = load_file(RECORDED / name / "reference.safetensors")
    head, cache = head_of(name, recorded["table"]), KVCache()
    head.dflash.read(cache, recorded["text"][:10].tolist(), recorded["states"])
    return head, recorded, head.dflash.fill(cache, int(recorded["text"][10]))


@pytest.mark.parametrize("name", ["dflash_red_hat", "dspark", "dspark_gated", "dspark_rnn", "dflash2_red_hat"])
def test_blocks_of_speculators_are_what_it_computed(name: str) -> None:
    """What a sequential part adds: along the text's own tokens, asked for in any order."""
    head, recorded, hidden_BH = filled(name)
    assert torch.allclose(hidden_BH, recorded["hidden"], atol=2e-5)
    first = len(hidden_BH) - head.dflash.fields.places
    assert first == (0 if name in ("dspark", "dspark_gated") else 1)
    out = recorded["head"] if head.out is None else head.out.weight
    assert (head.ids is None) == (name in ("dspark_gated", "dflash2_red_hat"))
    text = recorded["text"].tolist()
    for row in range(len(hidden_BH) - 1, first - 1, -1):
        logits_S, wanted_S = hidden_BH[row] @ out.T, recorded["logits"][row]
        if head.following is not None:
            path, other = tuple(text[10 : 11 + row - first]), (text[10], *[3] * (row - first))
            found_NS = head.following.logits(logits_S, hidden_BH, row, [other, path], {})
            logits_S = found_NS[1]
        if "best" in recorded:
            assert torch.allclose(logits_S[recorded["best"][row]], recorded["scores"][row], atol=1e-4)
            assert int(logits_S.isfinite().sum()) == 16
        else:
            assert torch.allclose(logits_S, wanted_S, atol=1e-4)


def test_dflash_2_chooses_the_path_that_its_package_chose() -> None:
    head, recorded, hidden_BH = filled("dflash2")
    assert torch.allclose(hidden_BH, recorded["hidden"], atol=5e-5)
    assert head.following is not None
    path = [int(recorded["text"][10])]
    for row in range(1, 6):
        logits_V = hidden_BH[row] @ recorded["head"].T
        path.append(int(head.following.logits(logits_V, hidden_BH, row, [tuple(path)], {}).argmax()))
    assert path[1:] == recorded["path"].tolist()


@pytest.mark.parametrize(
    ("name", "sampling"), zip(["dspark_gated", "dflash2_red_hat", "dspark_rnn"], SAMPLINGS, strict=True)
)
def test_a_part_that_knows_the_token_before_changes_no_text(case: Case, name: str, sampling: SamplingParams) -> None:
    """With a target that has rows for more tokens than its tokenizer names, too."""
    drafter = case.drafter(head_of(name, case.table_VH), entries=VOCABULARY - 6)
    texts_are_plain(case.target, drafter, PROMPTS, sampling, VOCABULARY)
    assert drafter.calibrations, "it learns"


@pytest.mark.parametrize(
    ("sampling", "overlap"), [*zip(SAMPLINGS, [False, True, True], strict=True)], ids=["greedy", "sampled", "penalised"]
)
def test_the_text_is_that_of_plain_decoding(case: Case, sampling: SamplingParams, overlap: bool) -> None:
    drafter = case.drafter()
    texts_are_plain(case.target, drafter, PROMPTS, sampling, VOCABULARY, overlap)
    assert drafter.calibrations, "it learns"


class Knowing(DFlash):
    """Knows what the target will write, and counts how often it is asked to fill."""

    def __init__(self, head: DFlash, target: TreeLM, text: list[int]) -> None:
        super().__init__(head.fields, Qwen3Config.from_dict(dict(head.fields.layer)), HIDDEN, head._table[0])
        (self.states_RH,) = target.forward([Rows.text(KVCache(), text)])
        self.fills = 0

    def read(self, cache: KVCache, tokens: list[int], states_RF: Tensor) -> None:
        cache.node_tokens.extend(tokens)
        cache.parents.extend(range(-1, len(tokens) - 1))
        cache.commit(range(len(tokens)))

    def fill(self, cache: KVCache, last: int) -> Tensor:
        self.fills += 1
        return self.states_RH[len(cache) - 1 : len(cache) + self.fields.block - 1]


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "sampled"])
def test_a_head_that_is_right_is_accepted_whole(case: Case, sampling: SamplingParams) -> None:
    """At any temperature, because the noise of all positions is known; with one pass a sweep."""
    long = replace(sampling, max_tokens=30)
    (plain,) = write(case.target, NoDrafter(), PROMPTS[:1], long, vocabulary=VOCABULARY)
    head = Knowing(case.head, case.target, plain.tokens)
    decoder = Decoder(case.target, case.drafter(BlockHead(head), Ranking(tau=0.01)), BestFirst(), 5)
    decoder.join(sequence_of(PROMPTS[0], long, vocabulary=VOCABULARY))
    decoder.step()  # reads the prompt: there are no hidden states before
    assert [decoder.step()[0].burst.accepted for _ in range(3)] == [5, 5, 5]
    assert head.fills == 3


def test_the_tree_is_the_best_prefixes_of_the_products(case: Case) -> None:
    """By levels: of the best 24 prefixes each has its own beginning among the best 24 of its length (DDTree)."""
    sure = Ranking(tau=0.3)
    drafter, sequence = case.drafter(ranking=sure), sequence_of(PROMPTS[0], SAMPLINGS[0], vocabulary=VOCABULARY)
    decoder = Decoder(case.target, drafter, BestFirst(), 24)
    decoder.join(sequence)
    decoder.step()
    (tree,) = BestFirst().grow(drafter, [sequence], FixedBudget(24), decoder.accounting.cost)
    by_depth = list[list[float]]()
    for depth in range(int(tree.depth_N.max()) + 1):
        node = int(np.flatnonzero(tree.depth_N == depth - 1)[0]) if depth else ROOT
        fresh = case.drafter(ranking=sure)
        fresh.guess([Ask(sequence, tree, [ROOT])], 32)
        (said,) = fresh.guess([Ask(sequence, tree, [node])], 32)
        by_depth.append(said.log_probs_NK[0].tolist())
    level, reach = [0.0], list[float]()
    for chances in by_depth:
        level = sorted((above + chance for above in level for chance in chances), reverse=True)[:24]
        reach += level
    assert np.allclose(sorted(tree.reach_N, reverse=True), sorted(reach, reverse=True)[:24])
    assert tree.depth_N.max() > 1


def test_a_text_that_goes_on_is_filled_again(case: Case) -> None:
    drafter = case.drafter()
    (first,) = write(case.target, drafter, PROMPTS[:1], SAMPLINGS[0], 24, vocabulary=VOCABULARY)
    cut: dict[object, KVCache] = {lm: cache.prefix(18) for lm, cache in first.caches.items()}
    bare: dict[object, KVCache] = {case.target: cut[case.target].prefix(18)}
    for caches in (first.caches, cut, bare):
        tokens = [*first.tokens[:20], 7, 8]
        (plain,) = write(case.target, NoDrafter(), [tokens], SAMPLINGS[0], vocabulary=VOCABULARY)
        decoder = Decoder(case.target, drafter, BestFirst(), 24)
        again = sequence_of(tokens, SAMPLINGS[0], vocabulary=VOCABULARY)
        again.caches.update(caches)
        decoder.join(again)
        nodes = [len(decoder.step()[0].burst.tree) for _ in range(3)]
        assert nodes[1:] == [24, 24]
        while decoder.live:
            decoder.step()
        assert again.answer == plain.answer
        assert not decoder.guarded.failure


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "llama"}, "is of a kind that is not read yet"),
        ({"dflash_config": {"block_size": 6}}, "lacks block_size, mask_token_id or target_layer_ids"),
        ({"model_type": "qwen3", "conv_kernel_size": -1}, "conv_kernel_size and conv_group_size are -1 and 0"),
        ({"mask_token_id": VOCABULARY}, "mask_token_id is 96, the target has 96 tokens"),
        ({"target_layer_ids": [-2, 1]}, r"target_layer_ids are \[-2, 1\]"),
        ({"target_layer_ids": []}, r"target_layer_ids are \[\]"),
        ({"hidden_size": "wide"}, "makes no sense"),
    ],
)
def test_a_head_of_another_kind_is_refused_by_name(change: dict[str, object], why: str) -> None:
    tensors, table = load_file(RECORDED / "dflash" / "model.safetensors"), torch.zeros(VOCABULARY, HIDDEN)
    told = settings(RECORDED / "dflash")
    fields = told.pop("dflash_config")
    assert isinstance(fields, dict)
    with pytest.raises(BadDrafter, match=why):
        loaded(told | (change if "dflash_config" in change else fields | change), tensors, sizes(table), "x")


def test_parts_that_are_not_known_are_refused_by_name() -> None:
    tensors, table = load_file(RECORDED / "dflash" / "model.safetensors"), torch.zeros(VOCABULARY, HIDDEN)
    more = tensors | {"refiner_head.markov_w1": torch.zeros(2, 2)}
    with pytest.raises(BadDrafter, match=r"'refiner_head.markov_w1' is a part that is not known"):
        loaded(settings(RECORDED / "dflash"), more, sizes(table), "x")
    with pytest.raises(BadDrafter, match=r"'fc.weight' is missing"):
        loaded(settings(RECORDED / "dflash"), {k: v for k, v in tensors.items() if k != "fc.weight"}, sizes(table), "x")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target that speaks the demo's tokens, and a head for it in a folder without a tokenizer."""
    target, head = tmp_path_factory.mktemp("pair") / "target", tmp_path_factory.mktemp("pair") / "head"
    target_of(target, 4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / file, target / file)
    head.mkdir()
    (head / "config.json").write_text(json.dumps(settings(RECORDED / "dflash") | {"vocab_size": 4096}))
    save_file(load_file(RECORDED / "dflash" / "model.safetensors"), head / "model.safetensors")
    return target, head


def test_a_folder_is_recognised_and_joined(pair: tuple[Path, Path]) -> None:
    target, head = map(str, pair)
    answers = {}
    for drafter in ("none", head, f"{head}+ngram"):
        with specexec.load(target, drafter=drafter, dtype="f32", offload="disk", budget=16, ctx=256) as llm:
            answers[drafter] = llm.generate("The with statement", replace(SAMPLINGS[1], max_tokens=12)).tokens
            assert not llm.drafter_failures
            assert llm.budget == 16
    assert len(set(answers.values())) == 1
    for option in ({"draft_vocab": 100}, {"drafter_quant": "nf4"}):
        with pytest.raises(BadDrafter, match=r"quantises|trims"):
            specexec.load(target, drafter=head, ctx=256, **option)


@pytest.mark.parametrize(
    ("key", "why"), [("num_target_layers", "9 layers, this one has 4"), ("vocab_size", "9 tokens, this one has 4096")]
)
def test_a_head_of_another_model_is_refused_by_name(
    key: str, why: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    (other / "config.json").write_text(json.dumps(settings(other) | {key: 9}))
    with pytest.raises(BadDrafter, match=why):
        specexec.load(str(pair[0]), drafter=str(other), ctx=256)


def test_plan_counts_head_and_hidden_states(pair: tuple[Path, Path]) -> None:
    found = {}
    for drafter in ("none", str(pair[1])):
        result = CliRunner().invoke(commands, ["plan", str(pair[0]), "-d", drafter, "--offline", "--ram", "8GiB"])
        assert result.exit_code == 0, result.output
        found[drafter] = "drafter" in result.output.split("RAM: ", 1)[1]
    assert found == {"none": False, str(pair[1]): True}


def test_fields_of_older_folders_are_at_the_top() -> None:
    old = settings(RECORDED / "dflash")
    told = old.pop("dflash_config")
    assert isinstance(told, dict)
    assert DFlashFields.of(old | told, [], "x").taps == (1, 3)
