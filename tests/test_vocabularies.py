"""Which vocabularies count as the same: all that differs are names of reserved places, and those are never drafted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import specexec
from specexec import SamplingParams
from specexec.text.vocabularies import differing_ids
from tests import real
from tests.tiny import tiny

RENAMED = {128_004: "<|finetune_right_pad_id|>", 128_008: "<|eom_id|>", 128_010: "<|python_tag|>"}


def llama_3_1(folder: Path) -> Path:
    """Llama 3.1's tokenizer: 3.0's, which the real file is, with three reserved places in use."""
    shutil.copytree(real.tokenizer("llama3_1"), folder)
    text = (folder / "tokenizer.json").read_text()
    for one in json.loads(text)["added_tokens"]:
        if one["id"] in RENAMED:
            text = text.replace(json.dumps(one["content"]), json.dumps(RENAMED[one["id"]]))
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").unlink()
    return folder


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def test_llama_3_0_beside_3_1_is_the_same_vocabulary_but_for_three_ids(tmp_path: Path) -> None:
    old, new = real.pretrained("llama3_1"), tokenizer(llama_3_1(tmp_path / "new"))
    assert differing_ids(old, new) == differing_ids(new, old) == frozenset(RENAMED)
    assert differing_ids(old, old) == frozenset()


def test_renamed_ids_are_never_drafted_and_the_text_is_the_targets(tmp_path: Path) -> None:
    """The drafter is the target itself, and both like the renamed ids best."""
    folders = {"target": real.tokenizer("llama3_1"), "drafter": llama_3_1(tmp_path / "new")}
    for name, source in folders.items():
        tiny("llama", tmp_path / name, vocab_size=128_256, hidden_size=32, head_dim=8, num_hidden_layers=1)
        for file in source.iterdir():
            shutil.copy(file, tmp_path / name / file.name)
    biased = SamplingParams(temperature=0.8, seed=1, max_tokens=8, logit_bias=((128_008, 12.0), (128_010, 12.0)))
    texts, drafted = [], set[int]()
    for drafter in ("none", str(tmp_path / "drafter")):
        with specexec.load(str(tmp_path / "target"), drafter=drafter, offload="none", dtype="f32", budget=8) as llm:
            bursts = list(llm.stream("Hello there", biased))
            assert set(llm.models) == {"target", "drafter"} if drafter != "none" else {"target"}
        texts.append([token for burst in bursts for token in burst.tokens])
        drafted |= {token for burst in bursts for token in burst.tree.tokens_N.tolist()}
    assert texts[0] == texts[1]
    assert set(texts[0]) & set(RENAMED)
    assert drafted
    assert not drafted & set(RENAMED)


@pytest.mark.parametrize("other", [name for name in real.TOKENIZERS if name != "llama3_1"])
def test_other_families_are_other_vocabularies(other: str) -> None:
    assert differing_ids(real.pretrained("llama3_1"), real.pretrained(other)) is None


def changed(folder: Path, **wanted: object) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer with one entry called otherwise, special or not."""
    source = json.loads((real.tokenizer("qwen3") / "tokenizer.json").read_text())
    source["added_tokens"][-1] |= wanted
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(source))
    return tokenizer(folder)


def test_a_renamed_word_is_another_vocabulary_and_a_renamed_mark_is_not(tmp_path: Path) -> None:
    """An added token that is special in neither is a word like any other."""
    plain = changed(tmp_path / "plain", content="</think>", special=False)
    last = plain.convert_tokens_to_ids("</think>")
    assert differing_ids(plain, changed(tmp_path / "word", content="</thoughts>", special=False)) is None
    assert differing_ids(plain, changed(tmp_path / "mark", content="<|other|>", special=True)) == frozenset({last})
