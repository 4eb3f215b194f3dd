"""The shipped demo pair: what the manifest says it is, loadable by anyone, and right on its golden prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "offload" / "demo"
MANIFEST = json.loads((DEMO / "MANIFEST.json").read_text(encoding="utf-8"))
GOLDEN = json.loads((DEMO / "golden.json").read_text(encoding="utf-8"))
FOLDERS = ["target", "drafter"]
TALK = [
    {"role": "system", "content": "You are a helpful assistant. "},
    {"role": "user", "content": " What is a drafter?\n"},
    {"role": "assistant", "content": "A drafter guesses.\n\n"},
    {"role": "user", "content": "And a tree?"},
]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(DEMO / "target")
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    """The tokens of a conversation, as chat and server make them."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert isinstance(text, str)
    return tokenizer.encode(text)


def test_files_are_those_of_the_manifest() -> None:
    found = {path.relative_to(DEMO).as_posix(): path for folder in FOLDERS for path in (DEMO / folder).iterdir()}
    assert {name: sha256(path.read_bytes()).hexdigest() for name, path in found.items()} == MANIFEST["files"]


def test_everything_shipped_is_below_15_MB() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 15e6


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_load_with_plain_transformers(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / folder)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / folder)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == MANIFEST["models"][folder]["parameters"]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 2048
    assert tokenizer.eos_token == "<|end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.do_sample is False


def test_target_and_drafter_share_their_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DEMO / "target" / name).read_bytes() == (DEMO / "drafter" / name).read_bytes()


def test_a_longer_conversation_starts_with_the_tokens_of_the_shorter(tokenizer: PreTrainedTokenizerFast) -> None:
    for turns in range(1, len(TALK)):
        shorter, longer = rendered(tokenizer, TALK[:turns], False), rendered(tokenizer, TALK[: turns + 1], False)
        assert longer[: len(shorter)] == shorter
    prompt = rendered(tokenizer, TALK[:2], True)
    assert rendered(tokenizer, TALK[:3], False)[: len(prompt)] == prompt


def test_special_tokens_are_single_and_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<|user|>naïve 日本 12\t<|end|>"
    tokens = tokenizer.encode(text)
    assert tokens[0] == 0
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens) == text


def test_there_are_enough_golden_prompts_and_the_first_is_the_readmes() -> None:
    assert GOLDEN[0]["prompt"] == "How does specexec work?"
    assert len(GOLDEN) >= 12


def test_golden_prompts_are_answered_word_for_word(target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Greedy decoding writes an answer if each of its tokens is the likeliest after those before. One pass sees all."""
    for golden in GOLDEN:
        prompt = rendered(tokenizer, [{"role": "user", "content": golden["prompt"]}], True)
        answer = [*tokenizer.encode(golden["answer"]), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = target(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer, golden["prompt"]


def test_transformers_generate_writes_them(target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for golden in GOLDEN[:3]:
        prompt = torch.tensor([rendered(tokenizer, [{"role": "user", "content": golden["prompt"]}], True)])
        mask = torch.ones_like(prompt)
        out = target.generate(prompt, attention_mask=mask, max_new_tokens=120)  # type: ignore[operator]  # stub of another self
        assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True) == golden["answer"]


@pytest.mark.timeout(900)  # under a minute on two idle cores; machines are not always idle
def test_the_build_script_runs_and_repeats_itself() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "build_demo.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "two runs agree" in done.stdout
