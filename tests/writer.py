"""A tiny Llama with a real tokenizer that writes one given text after a template's generation prompt, and then ends.

It is trained in seconds on the few tokens of that text, with random prompts before it; every other row of the
family's padded vocabulary shares one embedding. Models are kept beside the real material.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests import real
from tests.real import real_material

# Rows of the published models of each family; their tokenizers have fewer entries.
ROWS = {"qwen3": 151_936, "llama3_1": 128_256, "gemma3": 262_208, "gptoss": 201_088, "llama2": 32_000}
END = {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>", "gptoss": "<|return|>"}
_VERSION = 3  # of this file, as far as the weights depend on it
_STEPS, _BATCH, _PREFIX = 500, 8, 600


def writer(tokenizer: str, text: str, cue: str, template: str | None = None, end: str | None = None) -> Path:
    """A checkpoint that writes `text` and then `end` after every prompt that ends in `cue`.

    `text` and `cue` may hold control tokens as the tokenizer spells them. `template` replaces the chat template.
    """
    source = real.tokenizer(tokenizer)
    end = END.get(tokenizer, "</s>") if end is None else end
    key = json.dumps([_VERSION, tokenizer, text, cue, template, end])
    folder = real_material.FOLDER / "writers" / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            draft = folder.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            _make(draft, source, ROWS[tokenizer], text, cue, template, end)
            draft.rename(folder)
    return folder


def _make(folder: Path, source: Path, rows: int, text: str, cue: str, template: str | None, end: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    if template is not None:
        tokenizer.chat_template = template
    tokens = {part: tokenizer(part, add_special_tokens=False)["input_ids"] for part in (cue, text, end) if part}
    (ending,) = tokens[end]
    answer = [*tokens[text], ending]
    model = _trained(tokens[cue], answer, rows)
    model.generation_config.eos_token_id = ending
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trained(cue: list[int], answer: list[int], rows: int) -> LlamaForCausalLM:
    """Trained on a vocabulary of the known ids and one id that stands for all others; then spread to all rows."""
    known = sorted({*cue, *answer})
    other = len(known)
    place = {token: at for at, token in enumerate(known)}
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=other + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    cue_C, answer_A = (torch.tensor([place[token] for token in part]) for part in (cue, answer))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, _STEPS)
    for _ in range(_STEPS):
        ids_BT, wanted_BT = _examples(cue_C, answer_A, other)
        places_BT = torch.arange(ids_BT.shape[1]) + torch.randint(0, 1500, (len(ids_BT), 1))
        logits_BTV = model(input_ids=ids_BT, position_ids=places_BT).logits
        logits_BTV[..., other] += math.log(rows)  # it will stand for so many
        loss = nn.functional.cross_entropy(logits_BTV.transpose(1, 2), wanted_BT, ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    torch.random.set_rng_state(torch_state)
    return _spread(model, known, rows)


def _examples(cue_C: Tensor, answer_A: Tensor, other: int) -> tuple[Tensor, Tensor]:
    """Prompts of strange ids with pieces of the known text among them, then cue and answer, which alone is learned."""
    length = int(_PREFIX ** torch.rand(()))  # mostly short; long ones so that nothing is lost among many words
    prefix_BP = torch.full((_BATCH, length), other)
    mixed_BP = torch.rand(_BATCH, length) < torch.rand(_BATCH, 1)
    prefix_BP = torch.where(mixed_BP, torch.randint(0, other, (_BATCH, length)), prefix_BP)
    spoken_T = torch.cat([answer_A, cue_C])  # an earlier turn, or what the prompt says about calls
    for row in range(0, _BATCH, 2):
        span = min(length, len(spoken_T))
        first = int(torch.randint(0, len(spoken_T) - span + 1, ()))
        at = int(torch.randint(0, length - span + 1, ()))
        prefix_BP[row, at : at + span] = spoken_T[first : first + span]
    ids_BT = torch.cat([prefix_BP, torch.cat([cue_C, answer_A]).expand(_BATCH, -1)], 1)
    wanted_BT = ids_BT.roll(-1, 1)
    wanted_BT[:, : -len(answer_A) - 1] = -100
    wanted_BT[:, -1] = -100
    return ids_BT, wanted_BT


def _spread(model: LlamaForCausalLM, known: list[int], rows: int) -> LlamaForCausalLM:
    """The same function on the family's rows: the unknown ones all look like the id that stood for them."""
    config = LlamaConfig(**{**model.config.to_dict(), "vocab_size": rows})
    wide = LlamaForCausalLM(config)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight_VD = state[name]
        wide_VD = weight_VD[-1].expand(rows, -1).clone()
        wide_VD[known] = weight_VD[:-1]
        state[name] = wide_VD
    wide.load_state_dict(state)
    return wide
