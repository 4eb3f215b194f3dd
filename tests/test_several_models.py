"""Several drafter models joined: the text is the target's own, all of them guess, and all of them are counted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import offload
import specexec
from cli.engine.learned_store import learned_path
from cli.engine.prefix_store import PrefixStore
from offload.checkpoint.headers import open_folder
from offload.errors import OffloadError
from offload.hub.names import demo_folder
from offload.packs.pack import pack, plan
from specexec import SamplingParams
from specexec.drafters.few_bits import FourBit
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.translated import TranslatedDrafter
from specexec.drafters.union import Union
from specexec.engine.engine import Engine
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from tests.test_translated import permuted
from tests.tiny import tiny
from tests.writing import samplings

PROMPT = "The with statement"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SAMPLINGS = samplings(14)
SMALL = 1 << 10  # tokens of context: less to set aside


def perturbed(folder: Path, share: float = 0.5) -> Path:
    """The demo drafter with weights that are off by a share of their spread: it guesses something else."""
    shutil.copytree(demo_folder("drafter"), folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if tensor.dim() > 1:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * share
            weights[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def untrained(folder: Path) -> Path:
    """A model of another shape that has learned nothing, with the demo's tokenizer."""
    tiny("qwen3", folder, num_hidden_layers=1, vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(tmp_path_factory.mktemp("models") / "other")


@pytest.fixture(scope="module")
def useless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("models") / "useless")


def opened(drafter: str, **options: object) -> Engine:
    return specexec.load("demo", drafter=drafter, offload="none", dtype="f32", budget=24, ctx=SMALL, **options)  # type: ignore[arg-type]  # checked by load


def members(llm: Engine) -> list[object]:
    union = llm._decoder.drafter
    assert isinstance(union, Union)
    return [*union.members]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    with opened("none") as llm:
        return [llm.generate(PROMPT, sampling).tokens for sampling in SAMPLINGS]


@pytest.mark.parametrize("joined", ["sibling+{other}", "{useless}+sibling+ngram", "{other}+{useless}"])
def test_the_text_is_that_of_plain_decoding(
    joined: str, plain: list[tuple[int, ...]], other: Path, useless: Path
) -> None:
    with opened(joined.format(other=other, useless=useless)) as llm:
        assert [llm.generate(PROMPT, sampling).tokens for sampling in SAMPLINGS] == plain
        assert llm.sources == joined.format(other=other, useless=useless)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_all_of_them_guess_and_are_named_in_the_order_they_were_typed(sampling: SamplingParams, other: Path) -> None:
    with opened(f"{other}+sibling") as llm:
        assert llm.drafter_name == "other+demo drafter"
        guessed, taken = set(), set()
        for burst in llm.stream(PROMPT, sampling):
            guessed |= {*burst.tree.origin_N.tolist()}
            taken |= {int(burst.tree.origin_N[node]) for node in burst.path}
    assert guessed == {0b01, 0b10, 0b11}
    assert taken & {0b11, 0b10}, "what the better one guessed was kept"


def test_two_of_one_name_are_distinguished(other: Path, tmp_path: Path) -> None:
    same = shutil.copytree(other, tmp_path / "other")
    with opened(f"{other}+{same}") as llm:
        assert llm.drafter_name == f"{other}+{same}"


def test_the_memory_of_all_is_counted(other: Path, useless: Path) -> None:
    def taken(drafter: str) -> tuple[int, int, int]:
        with opened(drafter) as llm:
            placement = offload.stream_of(llm._model).placement
            return placement.need.beside_B["drafter"], llm.room.draft_B, llm.room.node_B

    none, one, two, both = (taken(name) for name in ("none", "sibling", str(useless), f"sibling+{useless}"))
    assert none[0] == none[1] == 0
    assert [b - a - c + n for n, a, c, b in zip(none, one, two, both, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("name", ["./again", "link", "{demo}"])
def test_one_model_by_two_names_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_folder("drafter"), tmp_path / "again")
    (tmp_path / "link").symlink_to(tmp_path / "again")
    second = {"./again": "again", "link": "again", "{demo}": "sibling"}[name]
    first = name.format(demo=demo_folder("drafter"))
    with pytest.raises(BadDrafter, match=f"names one model twice: {first} and {second} are both") as refused:
        opened(f"{first}+{second}")
    assert refused.value.hint


def test_without_a_pair_the_sibling_is_missed_whatever_is_joined(other: Path, tmp_path: Path) -> None:
    target = shutil.copytree(demo_folder("target"), tmp_path / "alone")
    with pytest.raises(BadDrafter, match="no drafter is paired with"):
        specexec.load(str(target), drafter=f"{other}+sibling")


def test_a_short_name_nearly_like_a_source_is_that_model(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path))
    with pytest.raises(BadDrafter, match="'ngrams' is none of sibling"):
        opened("ngrams")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(f'[alias.ngrams]\ntarget = "{other}"\n')
    with opened("ngrams+ngram") as llm:
        assert (llm.sources, llm.drafter_name) == ("ngrams+ngram", "other+ngram")


def test_one_may_have_another_vocabulary_and_then_only_the_others_are_trimmed(
    plain: list[tuple[int, ...]], tmp_path: Path
) -> None:
    theirs = permuted(tmp_path / "theirs")
    with opened(f"{theirs}+sibling", draft_vocab=1024) as llm:
        translated, sibling = members(llm)
        assert isinstance(translated, TranslatedDrafter)
        assert isinstance(sibling, SiblingDrafter)
        assert sibling._trimmed is not None
        assert [llm.generate(PROMPT, sampling).tokens for sampling in SAMPLINGS] == plain
        assert [*llm.models] == ["target", "drafter-2"]
        assert [*llm.folders] == ["target", "drafter", "drafter-2"]
    again = shutil.copytree(theirs, tmp_path / "again")
    with pytest.raises(BadDrafter, match="cannot trim a drafter with another vocabulary"):
        opened(f"{theirs}+{again}", draft_vocab=1024)


def test_those_that_have_few_bits_already_stay_as_they_are(other: Path, tmp_path: Path) -> None:
    packed, again = tmp_path / "packed", tmp_path / "again"
    pack(plan(open_folder(other), "int8"), packed)
    with opened(f"{packed}+sibling", drafter_quant="nf4") as llm:
        quantised = [
            any(isinstance(module, FourBit) for module in draft.model.modules()) for draft in llm._drafts.values()
        ]
        assert quantised == [False, True]
    shutil.copytree(packed, again)
    with pytest.raises(BadDrafter, match=r"packed and .*again are quantised already"):
        opened(f"{packed}+{again}", drafter_quant="nf4")


def test_verify_looks_at_all_of_them(other: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack(plan(open_folder(other), "none"), packed)
    file = max(packed.glob("*.safetensors"), key=lambda one: one.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(OffloadError, match="damaged"):
        opened(f"sibling+{packed}", verify=True)


def test_a_dialogue_keeps_the_keys_and_values_of_all(useless: Path, tmp_path: Path) -> None:
    with opened(f"{useless}+sibling") as llm:
        llm.prefixes = PrefixStore.of(llm, tmp_path)
        conversation = llm.conversation()
        list(conversation.send("What is a tree?", GREEDY))
        held, found = conversation._caches, dict[object, KVCache]()
        llm.prefixes.fill(conversation.keep().turns[-1].tokens, found)
        assert {*found} == {*held} == {*llm.models.values()}
        assert {*llm.models} == {"target", "drafter", "drafter-2"}
        layers = {role: len(found[lm].layers) for role, lm in llm.models.items()}
    assert layers["drafter"] == 1 < layers["drafter-2"]


def test_what_was_learned_belongs_to_these_models_in_this_order(
    other: Path, useless: Path, opener: Callable[[str], Engine]
) -> None:
    names = [f"sibling+{other}", f"{other}+sibling", f"sibling+{useless}", "sibling"]
    assert len({learned_path(opener(name)) for name in names}) == len(names)
    both = opener(names[0])
    both.generate(PROMPT, GREEDY)
    again = opener(names[0])
    again.unpack(both.pack())
    learned = [member.calibration(GREEDY).weight for member in members(again) if isinstance(member, SiblingDrafter)]
    assert all(learned)
    with pytest.raises(ValueError, match="other members"):
        opener(f"{names[0]}+ngram").unpack(both.pack())


@pytest.fixture
def opener(request: pytest.FixtureRequest) -> Callable[[str], Engine]:
    """Engines that are closed after the test."""

    def open_one(drafter: str) -> Engine:
        llm = opened(drafter)
        request.addfinalizer(llm.close)
        return llm

    return open_one
