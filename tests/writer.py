"""Tiny Llamas with a real tokenizer that write given texts after a template's generation prompt, and then end.

Nothing is trained: a table says which token follows which tokens before it, and the weights are that table. Attention
heads look back by fixed distances, each neuron knows one context, and its output is the token that comes next. So
nothing but the last tokens matters, whatever the prompt; where a grammar wants something else, shorter contexts decide.
T tokens of a text   D distances   B bits of a code   H width
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TypeAlias

import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests import real
from tests.real import real_material

# Rows of the published models of each family; their tokenizers have fewer entries.
ROWS = {
    "qwen3": 151_936, "llama3_1": 128_256, "gemma3": 262_208, "gptoss": 201_088, "llama2": 32_000,
    "mistral_nemo": 131_072,
}  # fmt: skip
END = {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>", "gptoss": "<|return|>"}
_VERSION = 9  # of this file, as far as the weights depend on it

# How far before the next token a head looks; 0 is the last token itself. A model has as many as its texts need.
_BACK = (0, 1, 2, 4, 7, 11, 16, 22, 29, 37, 46, 56, 3, 5, 9, 13, 19, 25, 33, 41, 51, 63)
_BITS, _APART = 16, 4  # codes of tokens are ±1; any two differ in so many of them
_CONSTANT, _FLAG, _KEY, _CODES = 0, 1, 2, 2 + _BITS  # places in the width; the last for each distance
_HEAD, _THETA = 128, 1000.0
_SHARP = 1000.0  # of attention: the score of the one place that is looked at
_LOUD = 200.0  # of what a neuron says, against the codes that were there before
_LOUDER = 4  # with each token of its context: many short contexts may say other things at once


_Before: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Saying:
    """After `cue`, `answer`, which holds its own end. With a key, only if that token was the last key in the prompt."""

    cue: tuple[int, ...]
    answer: tuple[int, ...]
    key: int | None = None


@dataclass(frozen=True)
class _Context:
    """Tokens at the first of the distances, and the key, if any."""

    before: _Before
    key: int | None


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
            known = AutoTokenizer.from_pretrained(source)
            if template is not None:
                known.chat_template = template
            cued, said = (tuple(known(part, add_special_tokens=False)["input_ids"]) for part in (cue, text + end))
            save(draft, known, ROWS[tokenizer], [Saying(cued, said)])
            draft.rename(folder)
    return folder


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int, sayings: Items[Saying]) -> None:
    """Write a checkpoint that says all of these."""
    model = _model(rows, sayings)
    model.generation_config.eos_token_id = sorted({saying.answer[-1] for saying in sayings})
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _model(rows: int, sayings: Items[Saying]) -> LlamaForCausalLM:
    table = sorted(_table(sayings), key=repr)
    said = {token for saying in sayings for token in (*saying.cue, *saying.answer)}
    keys = {saying.key for saying in sayings if saying.key is not None}
    code = dict(zip(sorted(said | keys), _codes(), strict=False))
    heads = max(len(context.before) for context, _ in table)  # of which the first is not needed, but one for keys
    width = -(-(_CODES + _BITS * heads) // heads) * heads
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=len(table) + 1,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=_HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    constant = float(_BITS * (heads + 1))  # much more than all codes, so that every place has about the same norm
    embedding_VH, head_VH = model.model.embed_tokens.weight, model.lm_head.weight
    embedding_VH[:, _CONSTANT] = constant
    for token, code_B in code.items():
        embedding_VH[token, _CODES : _CODES + _BITS] = code_B
        head_VH[token, _CODES : _CODES + _BITS] = code_B
    embedding_VH[sorted(keys), _FLAG] = 1.0
    scale = (constant**2 / width) ** 0.5
    _look_back(model, heads, scale, constant)
    _know(model, table, code, scale, constant, sayings[0].answer[-1])
    # The model's own table of frequencies was made on no device at all.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _look_back(model: LlamaForCausalLM, heads: int, scale: float, constant: float) -> None:
    """One head for each distance but the first, and one that looks at the last key word."""
    attention = model.model.layers[0].self_attn
    half = _HEAD // 2
    turns = 1 / _THETA ** (torch.arange(half) / half)  # radians that each pair of dimensions turns by per token
    quick = turns > 0.1
    size = (_SHARP * _HEAD**0.5 / quick.sum()) ** 0.5 * scale / constant
    attention.k_proj.weight[:half, _CONSTANT] = quick * size
    attention.k_proj.weight[half - 1, _FLAG] = scale
    attention.v_proj.weight[:_BITS, _CODES : _CODES + _BITS] = torch.eye(_BITS)
    for head, distance in enumerate([*_BACK[1:heads], None]):
        query_Q = attention.q_proj.weight[head * _HEAD : (head + 1) * _HEAD, _CONSTANT]
        if distance is None:
            query_Q[half - 1] = _SHARP * _HEAD**0.5 * scale / constant
        else:
            query_Q[:half] = quick * size * torch.cos(turns * distance)
            query_Q[half:] = quick * size * -torch.sin(turns * distance)
        place = _KEY if distance is None else _CODES + _BITS * (head + 1)
        attention.o_proj.weight[place : place + _BITS, head * _HEAD : head * _HEAD + _BITS] = scale * torch.eye(_BITS)


def _know(
    model: LlamaForCausalLM,
    table: Items[tuple[_Context, int]],
    code: dict[int, Tensor],
    scale: float,
    constant: float,
    end: int,
) -> None:
    """One neuron for each row of the table, and a last one that ends a text where no other knows on."""
    mlp = model.model.layers[0].mlp
    sure = 40.0 / _APART * scale  # times what an exact match has more than it needs
    for neuron, (context, following) in enumerate(table):
        gate_H = mlp.gate_proj.weight[neuron]
        for place, token in enumerate(context.before):
            gate_H[_CODES + _BITS * place : _CODES + _BITS * (place + 1)] = sure * code[token]
        if context.key is not None:
            gate_H[_KEY : _KEY + _BITS] = sure * code[context.key]
        matches = len(context.before) + (context.key is not None)
        gate_H[_CONSTANT] = sure * (_APART - _BITS * matches) / constant
        mlp.down_proj.weight[_CODES : _CODES + _BITS, neuron] = (
            code[following] * _LOUD * _LOUDER ** len(context.before) / 40.0
        )
    mlp.gate_proj.weight[-1, _CONSTANT] = sure * _APART / constant
    mlp.down_proj.weight[_CODES : _CODES + _BITS, -1] = code[end] * 4 / 40.0
    mlp.up_proj.weight[:, _CONSTANT] = scale / constant


def _table(sayings: Items[Saying]) -> set[tuple[_Context, int]]:
    """What follows which context: those of one and three tokens, and what tells a place from all others in its text."""
    table: set[tuple[_Context, int]] = set()
    for saying in sayings:
        tokens = (*saying.cue, *saying.answer)
        befores = {at: _before(tokens, at) for at in range(len(saying.cue), len(tokens))}
        for at, before in befores.items():
            others = [other for place, other in befores.items() if tokens[place] != tokens[at]]
            lengths = {1, 3, _telling(before, others)}
            table |= {(_Context(before[:length], saying.key), tokens[at]) for length in lengths}
    return table


def _telling(before: _Before, others: list[_Before]) -> int:
    """How long a context must be, so that no other looks like it; one that reaches back further is louder anyway."""
    for length in range(1, len(before) + 1):
        others = [other for other in others if other[length - 1 : length] == before[length - 1 : length]]
        if not others:
            return length
    assert all(len(other) > len(before) for other in others), f"{before} in a text is followed by more than one token"
    return len(before)


def _before(tokens: Items[int], at: int) -> _Before:
    """What the heads see before a place, as far as the cue reaches."""
    return tuple(tokens[at - 1 - back] for back in takewhile(at.__gt__, _BACK))


def _codes() -> Iterator[Tensor]:
    """The extended Hamming code of 2,048 words, as ±1."""
    bits_NB = (torch.arange(1, 2**_BITS)[:, None] >> torch.arange(_BITS)) & 1
    syndrome_N = torch.zeros(len(bits_NB), dtype=torch.long)
    for place in range(_BITS):
        syndrome_N ^= bits_NB[:, place] * place
    good_N = (bits_NB.sum(1) % 2 == 0) & (syndrome_N == 0)
    return iter((2 * bits_NB[good_N] - 1).float())
