"""What EasySpec's layers side by side cost a drafter in guesses, and what they could save on one device.

EasySpec (Wu et al. 2025) lets the attentions of N layers that follow each other read the same input, so that N devices
compute them at once; the MLPs follow one after the other. Prints, for each N, how often the model so computed has the
same first choice as computed exactly, along texts that it wrote itself (greedily, behind the prompts of prompts.jsonl),
and the seconds of the attentions' products for one token: layer by layer, and of each N layers as one wide product.
Both read every weight once, which is what such a product waits for.

    python scripts/measure_easyspec.py [--model FOLDER]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from timing import best_s
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).parents[1]
GROUPS = (1, 2, 3, 4, 5)
TEXTS, TOKENS, REPEATS = 12, 48, 300


@torch.no_grad()
def choices(model: PreTrainedModel, ids_T: Tensor, group: int) -> Tensor:
    """First choice behind each token, the attentions of `group` layers side by side."""
    trunk = model.get_submodule("model")
    layers, places = [*trunk.get_submodule("layers").children()], torch.arange(len(ids_T))[None]
    x_1TH = trunk.get_submodule("embed_tokens")(ids_T[None])
    turned = trunk.get_submodule("rotary_emb")(x_1TH, places)
    mask = torch.full((len(ids_T), len(ids_T)), float("-inf")).triu(1)[None, None]
    for first in range(0, len(layers), group):
        together = layers[first : first + group]
        mixed = [
            layer.get_submodule("self_attn")(
                hidden_states=layer.get_submodule("input_layernorm")(x_1TH), position_embeddings=turned,
                attention_mask=mask,
            )[0]
            for layer in together
        ]  # fmt: skip
        x_1TH = x_1TH + sum(mixed)
        for layer in together:
            x_1TH = x_1TH + layer.get_submodule("mlp")(layer.get_submodule("post_attention_layernorm")(x_1TH))
    logits: Tensor = model.get_output_embeddings()(trunk.get_submodule("norm")(x_1TH))
    return logits[0].argmax(-1)


@torch.no_grad()
def seconds(model: PreTrainedModel, group: int) -> tuple[float, float]:
    """Of the products of one token with queries, keys and values of all layers: one by one, and each group's as one."""
    layers = [*model.get_submodule("model.layers").children()]
    weights = [
        torch.cat([getattr(layer.get_submodule("self_attn"), name).weight for name in ("q_proj", "k_proj", "v_proj")])
        for layer in layers
    ]
    wide = [torch.cat(weights[first : first + group]) for first in range(0, len(layers), group)]
    row_1H = torch.randn(1, weights[0].shape[1])
    one_by_one_s = best_s(lambda: [linear(row_1H, one) for one in weights], REPEATS)
    return one_by_one_s, best_s(lambda: [linear(row_1H, one) for one in wide], REPEATS)


@click.command()
@click.option("--model", default=str(ROOT / "offload" / "demo" / "target"), help="A model of Llama's kind.")
def main(model: str) -> None:
    """Measure both."""
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = Path(__file__).with_name("prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    texts = [
        lm.generate(tokenizer(prompt, return_tensors="pt").input_ids, do_sample=False, max_new_tokens=TOKENS)[0]
        for prompt in prompts[:TEXTS]
    ]
    exact = [choices(lm, text, 1) for text in texts]
    count = len([*lm.get_submodule("model.layers").children()])
    click.echo(f"{count} layers, {sum(map(len, texts))} tokens, {torch.get_num_threads()} threads\n")
    click.echo("| layers side by side | same first choice | products one by one, µs | as wide ones, µs |")
    click.echo("|---|---|---|---|")
    for group in (one for one in GROUPS if one <= count):
        same = torch.cat([choices(lm, text, group) == whole for text, whole in zip(texts, exact, strict=True)])
        apart_s, wide_s = seconds(lm, group)
        click.echo(f"| {group} | {same.double().mean():.1%} | {1e6 * apart_s:.0f} | {1e6 * wide_s:.0f} |")


if __name__ == "__main__":
    main()
