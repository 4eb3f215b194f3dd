"""Gemma 4's assistants guess what transformers' own class does, from their target's keys and values alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

import offload
import specexec
from cli.app import commands
from offload.checkpoint.headers import open_folder
from offload.hub.names import demo_folder
from offload.machine.memory import Free
from offload.placement.placement import Offload
from specexec.compose.head_folders import head_in_words, head_kind
from specexec.compose.load_options import LoadOptions
from specexec.compose.memory_plan import LoadRequest, need_with
from specexec.drafters.heads.assistant import Assistant, ReadFeatures, loaded
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.registry import DrafterChoice
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import LAST
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.assistant_models import BEST, CLUSTERS, assistant_of, gemma
from tests.tiny import VOCABULARY
from tests.writing import prompt, sequence_of, texts_are_plain, write

LONG = prompt(300, most=240)
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=10),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=10),
]
PROMPTS = [prompt(length, length, 240) for length in (21, 5, 13)]


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


class Case:
    """A target, an assistant for it, and both as transformers has them. Layers of the target share keys, or do not."""

    def __init__(self, folder: Path, shared: int, ordered: bool) -> None:
        self.folder = folder
        self.model = gemma(folder / "target", shared=shared)
        self.theirs = assistant_of(self.model, folder / "assistant", ordered)
        self.target = TreeLM(offload.load(folder / "target", "none"))
        self.assistant = self.of(self.target)

    def of(self, target: TreeLM, window: int | None = None) -> Assistant:
        folder = self.folder / "assistant"
        return loaded(settings(folder), load_file(folder / "model.safetensors"), target, "x", window)

    def drafter(self, window: int | None = None) -> HeadDrafter:
        assistant = self.of(self.target, window)
        return HeadDrafter(assistant, ReadFeatures(assistant, self.target), VOCABULARY)

    def expected(self, text: list[int], path: list[int]) -> Tensor:
        """Logits [1 + path, V] behind a text and each token of a path, by transformers' target and assistant."""
        with torch.no_grad():
            read = self.model.model(torch.tensor([text[:-1]]), output_hidden_states=True, return_shared_kv_states=True)
        return self.said(text, path, read.hidden_states[-1][:, -1:], dict(read.shared_kv_states))

    def said(self, text: list[int], path: list[int], h: Tensor, shared: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The same by the assistant alone, of the target's last state and its keys and values."""
        embeddings, found = self.model.get_input_embeddings(), list[Tensor]()
        with torch.no_grad():
            for token in (text[-1], *path):
                said = self.theirs(
                    inputs_embeds=torch.cat([embeddings(torch.tensor([[token]])), h], -1),
                    position_ids=torch.tensor([[len(text) - 1]]), shared_kv_states=shared, use_cache=False,
                )  # fmt: skip
                h = said.last_hidden_state
                found.append(said.logits[0, 0])
        return torch.stack(found)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Each layer has keys of its own, as in the larger models of the family."""
    case = Case(tmp_path_factory.mktemp("plain"), 0, False)
    yield case
    case.target.close()


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """The last layers attend to keys of others, the assistant compares tokens of some clusters: as in small ones."""
    case = Case(tmp_path_factory.mktemp("sharing"), 2, True)
    yield case
    case.target.close()


@pytest.fixture(params=["plain", "sharing"])
def case(request: pytest.FixtureRequest) -> Case:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Case)
    return found


def read_by(target: TreeLM, text: list[int]) -> KVCache:
    """A cache of all of a text but its last token, read in one sweep."""
    target.taps.want(read_by, [LAST])
    cache = KVCache()
    target.forward([Rows.text(cache, text[:-1])])
    cache.commit(range(len(text) - 1))
    return cache


def said_below(assistant: Assistant, read: KVCache, text: list[int], paths: list[list[int]]) -> list[Tensor]:
    """Logits [1 + path, V] behind a text and below it along paths, all paths in one pass a level."""
    assert read.taken is not None
    own, end = KVCache(), read.taken.end
    own.tokens, own.unread = text[:-1], len(text) - 1
    (y,) = assistant.forward([Rows(own, text[-1:], [-1], 1, read.taken.between(LAST, end - 1, end), read)])
    level, found = [y[0]] * len(paths), [[assistant.head(y)[0]] for _ in paths]
    parents = [0] * len(paths)
    for depth in range(len(paths[0])):
        features = assistant.post_projection(torch.stack(level))
        first = len(own.parents)
        (ys,) = assistant.forward([Rows(own, [path[depth] for path in paths], parents, 0, features, read)])
        level, parents = list(ys), [first + i for i in range(len(paths))]
        for one, logits in zip(found, assistant.head(ys), strict=True):
            one.append(logits)
    return [torch.stack(one) for one in found]


def kept_by(target: TreeLM, cache: KVCache) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The last state of a text, and the keys and values of the last layers that have some, as transformers hands on."""
    shared = {}
    for kind, kv in zip(("sliding_attention", "full_attention"), [*cache.layers.values()][-2:], strict=True):
        keys, values = (target.kept.plain(rows[:, : len(cache)])[None].float() for rows in (kv.keys_HRD, kv.values_HRD))
        shared[kind] = keys, values
    assert cache.taken is not None
    return cache.taken.states[LAST][None, -1:], shared


def alike(ours: Tensor, theirs: Tensor, most: float = 1e-5) -> bool:
    """Where it compares; the other tokens are as low as can be here, and one below the lowest there."""
    for our, their in zip(ours, theirs, strict=True):
        compared = our.isfinite()
        if not torch.allclose(our[compared], their[compared], atol=most):
            return False
        if not torch.allclose(their[~compared], their[compared].min() - 1.0, atol=most):
            return False
    return True


@pytest.mark.parametrize("length", [3, 40, 300], ids=["within windows", "beyond windows", "in pieces"])
def test_guesses_below_a_text_are_those_of_transformers(case: Case, length: int) -> None:
    """Along two paths: each row reads its parent, all rows have one position, and the text alone is attended to."""
    text, paths = LONG[:length], [[7, 9, 200], [9, 9, 3]]
    cache = read_by(case.target, text)
    found = said_below(case.assistant, cache, text, paths)
    for path, ours in zip(paths, found, strict=True):
        theirs = case.said(text, path, *kept_by(case.target, cache))
        assert alike(ours[:1], theirs[:1])
        assert alike(ours, theirs, 2e-4), "each row multiplies the rounding errors of the one above"
        assert alike(ours, case.expected(text, path), 1e-3), "both targets read the same but for rounding"
        assert len(ours[0][ours[0].isfinite()]) == (
            BEST * VOCABULARY // CLUSTERS if case.assistant.fields.clusters else VOCABULARY
        )


@pytest.mark.parametrize(("case", "mode"), [("plain", "disk"), ("sharing", "ram")], indirect=["case"])
def test_it_guesses_the_same_wherever_layers_live(case: Case, mode: Offload) -> None:
    text, paths = LONG[:290], [[7, 9]]
    (wanted,) = said_below(case.assistant, read_by(case.target, text), text, paths)
    target = TreeLM(offload.load(case.folder / "target", mode))
    (found,) = said_below(case.of(target), read_by(target, text), text, paths)
    assert torch.allclose(found, wanted, atol=1e-5)
    target.close()


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_it_reads_keys_in_few_bits_as_its_target_does(case: Case) -> None:
    """What transformers' assistant makes of the same rows turned back; what is found has 12 significant bits."""
    text, path = LONG[:40], [7, 9]
    target = TreeLM(offload.load(case.folder / "target", "none"))
    target.keep_in(8)
    cache = read_by(target, text)
    (found,) = said_below(case.of(target), cache, text, [path])
    assert alike(found, case.said(text, path, *kept_by(target, cache)), 5e-3)
    target.close()


def test_nodes_of_a_sweep_are_never_seen(case: Case) -> None:
    """Neither while they hang below the text, nor once some of them became text."""
    text = LONG[:30]
    cache = read_by(case.target, text)
    (wanted,) = said_below(case.assistant, cache, text, [[5]])
    case.target.forward([Rows(cache, [text[-1], 11, 12, 13], [-1, 0, 0, 2])])
    (found,) = said_below(case.assistant, cache, text, [[5]])
    assert torch.equal(found, wanted)
    cache.commit([0, 2])
    longer = [*text, 12, 99]
    (found,) = said_below(case.assistant, cache, longer, [[5]])
    assert alike(found, case.expected(longer, [5]), 1e-3)


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_its_first_guesses_are_those_that_generate_drafts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = list[list[int]]()
    draft = SinglePositionMultiTokenCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = draft(self, input_ids, *args, **kwargs)
        if ids.shape[1] > input_ids.shape[1]:
            drafted.append(ids[0].tolist())
        return ids, logits

    monkeypatch.setattr(SinglePositionMultiTokenCandidateGenerator, "get_candidates", recorded)
    case.theirs.generation_config.num_assistant_tokens = 4
    generate: Any = case.model.generate
    with torch.no_grad():
        written = generate(torch.tensor([PROMPTS[0]]), assistant_model=case.theirs, do_sample=False, max_new_tokens=8)[
            0
        ].tolist()
    text, path = drafted[0][:-4], drafted[0][-4:]
    found = said_below(case.assistant, read_by(case.target, text), text, [path])[0]
    assert found.argmax(-1).tolist()[:4] == path
    (ours,) = write(case.target, case.drafter(), PROMPTS[:1], replace(SAMPLINGS[0], max_tokens=8))
    assert ours.tokens == written


@pytest.mark.parametrize(
    ("case", "sampling", "overlap"),
    [*zip(["plain", "sharing"], SAMPLINGS, [False, True], strict=True)],
    ids=["greedy", "sampled"],
    indirect=["case"],
)
def test_the_text_is_that_of_plain_decoding(case: Case, sampling: SamplingParams, overlap: bool) -> None:
    drafter = case.drafter(6 if overlap else None)
    texts_are_plain(case.target, drafter, PROMPTS, sampling, VOCABULARY, overlap)
    assert drafter.calibrations, "it learns"


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_a_window_bounds_what_it_sees_of_a_long_text(case: Case) -> None:
    """The first tokens and the last ones: as much as of a text in which the others are not there."""
    text = LONG[:200]
    cache = read_by(case.target, text)
    (whole,) = said_below(case.assistant, cache, text, [[5]])
    (within,) = said_below(case.of(case.target, 199), cache, text, [[5]])
    assert torch.equal(within, whole)
    (found,) = said_below(case.of(case.target, 20), cache, text, [[5]])
    assert not torch.allclose(found, whole, atol=1e-3)
    keep = torch.tensor([*range(4), *range(179, 199)])
    for kv in cache.layers.values():
        kv.keys_HRD[:, :24], kv.values_HRD[:, :24] = kv.keys_HRD[:, keep], kv.values_HRD[:, keep]
    cache.dropped = 175
    (cut,) = said_below(case.assistant, cache, text, [[5]])
    assert torch.allclose(found, cut, atol=1e-5)


class Knowing(Assistant):
    """Knows what the target will write: its rows are the target's own states there."""

    def knows(self, text: list[int]) -> None:
        (self.states_RH,) = self._target.forward([Rows.text(KVCache(), text)])

    def forward(self, parts: list[Rows]) -> list[Tensor]:
        said = list[Tensor]()
        for part in parts:
            part.cache.node_tokens.extend(part.tokens)
            part.cache.parents.extend(part.parents)
            depths = [0]
            for parent in part.cache.parents[1:]:
                depths.append(depths[parent] + 1)
            assert part.read is not None
            rows = [min(len(part.read) + depth, len(self.states_RH) - 1) for depth in depths[-len(part.tokens) :]]
            said.append(self.states_RH[rows])
        return said

    def head(self, y_RH: Tensor) -> Tensor:
        return self._target.head(y_RH)


@pytest.mark.parametrize("case", ["plain"], indirect=True)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_an_assistant_that_is_right_is_accepted_whole(case: Case, sampling: SamplingParams) -> None:
    long = replace(sampling, max_tokens=30)
    (plain,) = write(case.target, NoDrafter(), PROMPTS[:1], long)
    knowing = case.of(case.target)
    knowing.__class__ = Knowing
    assert isinstance(knowing, Knowing)
    knowing.knows(plain.tokens)
    knowing.post_projection = torch.nn.Identity()  # type: ignore[assignment]
    drafter = HeadDrafter(knowing, ReadFeatures(knowing, case.target), VOCABULARY, Ranking(tau=0.01))
    decoder = Decoder(case.target, drafter, BestFirst(), 5)
    decoder.join(sequence_of(PROMPTS[0], long))
    decoder.step()  # reads the prompt: there is nothing to attend to before
    assert [decoder.step()[0].burst.accepted for _ in range(3)] == [5, 5, 5]


@pytest.mark.parametrize("case", ["sharing"], indirect=True)
def test_a_text_that_goes_on_is_guessed_again(case: Case) -> None:
    """From a part of its caches, and from the target's alone."""
    drafter = case.drafter()
    (first,) = write(case.target, drafter, PROMPTS[:1], SAMPLINGS[0], 24)
    cut: dict[object, KVCache] = {lm: cache.prefix(18) for lm, cache in first.caches.items()}
    bare: dict[object, KVCache] = {case.target: cut[case.target].prefix(18)}
    tokens = [*first.tokens[:20], 7, 8]
    (plain,) = write(case.target, NoDrafter(), [tokens], SAMPLINGS[0])
    for caches in (cut, bare):
        decoder = Decoder(case.target, drafter, BestFirst(), 24)
        again = sequence_of(tokens, SAMPLINGS[0])
        again.caches.update(caches)
        decoder.join(again)
        assert [len(decoder.step()[0].burst.tree) for _ in range(3)][1:] == [24, 24]
        while decoder.live:
            decoder.step()
        assert again.answer == plain.answer
        assert not decoder.guarded.failure


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target that speaks the demo's tokens, and an assistant for it in a folder without a tokenizer."""
    target, head = (tmp_path_factory.mktemp("pair") / name for name in ("target", "assistant"))
    assistant_of(gemma(target, vocabulary=4096), head)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / file, target / file)
    return target, head


def test_a_folder_is_recognised_and_joined(pair: tuple[Path, Path]) -> None:
    target, head = map(str, pair)
    assert head_kind(open_folder(pair[1])) == "Gemma 4 assistant"
    assert head_in_words(open_folder(pair[1])) == "a head that drafts (Gemma 4 assistant)"
    answers = {}
    for drafter in ("none", f"{head}+ngram"):
        with specexec.load(target, drafter=drafter, dtype="f32", offload="disk", budget=16, ctx=256) as llm:
            answers[drafter] = llm.generate("The with statement", replace(SAMPLINGS[1], max_tokens=12)).tokens
            assert not llm.drafter_failures
    assert len(set(answers.values())) == 1
    shown = CliRunner().invoke(commands, ["models", "show", head])
    assert "Gemma 4 assistant" in shown.output


def test_plan_counts_it_and_keeps_the_keys_that_it_reads_where_it_computes(pair: tuple[Path, Path]) -> None:
    target, head = map(open_folder, pair)
    free = Free(ram_B=8 << 30, vram_B=8 << 30)
    request = LoadRequest.of(target, (head,), LoadOptions(dtype="f32"), 4096, free)
    plain, drafted = (need_with(request, DrafterChoice(sources)) for sources in ((), ("sibling",)))
    assert plain.cache_stays == frozenset()
    assert drafted.cache_stays == {2, 3}, "the last sliding and the last full layer"
    weights_B = sum(entry.nbytes for entry in head.entries.values())
    states_B = 4 * (4096 + request.nodes) * 64
    assert drafted.beside_B["drafter"] > weights_B + states_B
    assert request.widths(request.drafters[0]).token_B == 0, "it keeps no keys and values"
    result = CliRunner().invoke(commands, ["plan", str(pair[0]), "-d", str(pair[1]), "--offline", "--ram", "8GiB"])
    assert result.exit_code == 0, result.output
    assert "drafter" in result.output.split("RAM: ", 1)[1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"backbone_hidden_size": 48}, "48 hidden numbers, this one has 64"),
        ({"text_config": {"vocab_size": 99}}, "99 tokens, this one has 4096"),
        ({"text_config": {"head_dim": 8}}, "4 heads of 8 numbers for the keys of layer 2, this"),
        ({"text_config": {"layer_types": ["chunked_attention"] * 3}}, "chunked_attention layers, this one has"),
        ({"text_config": {"layer_types": ["full_attention"]}}, "1 layer_types for 3 layers"),
        ({"backbone_hidden_size": None}, "lacks backbone_hidden_size"),
        ({"use_ordered_embeddings": True, "num_centroids": 33}, "4096 tokens in 33 clusters, of which it compares 5"),
    ],
)
def test_an_assistant_of_another_model_is_refused_by_name(
    change: dict[str, Any], why: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    told = settings(other)
    text = told["text_config"] | change.get("text_config", {})
    (other / "config.json").write_text(json.dumps(told | change | {"text_config": text}))
    with pytest.raises(BadDrafter, match=why):
        specexec.load(str(pair[0]), drafter=str(other), ctx=256)


def test_an_assistant_beside_a_model_of_another_family_is_refused_by_name(pair: tuple[Path, Path]) -> None:
    with pytest.raises(BadDrafter, match="is a head \\(Gemma 4 assistant\\) for a model with"):
        specexec.load("demo", drafter=str(pair[1]), ctx=256)


@pytest.mark.parametrize("case", ["sharing"], indirect=True)
def test_parts_that_are_missing_or_unknown_are_refused_by_name(case: Case) -> None:
    folder = case.folder / "assistant"
    tensors, told = load_file(folder / "model.safetensors"), settings(folder)
    with pytest.raises(BadDrafter, match=r"'experts.router' is a part that is not known"):
        loaded(told, tensors | {"experts.router": torch.zeros(2, 2)}, case.target, "x")
    with pytest.raises(BadDrafter, match=r"'post_projection.weight' is missing"):
        loaded(told, {key: one for key, one in tensors.items() if key != "post_projection.weight"}, case.target, "x")
    twice = torch.zeros(VOCABULARY, dtype=torch.long)
    with pytest.raises(BadDrafter, match="is no order of 256 tokens"):
        loaded(told, tensors | {"masked_embedding.token_ordering": twice}, case.target, "x")
