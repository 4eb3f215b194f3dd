"""A target with recurrent layers and experts and its drafter, trained by the demo's recipe in minutes of one core.

Both are Qwen3-Next in small: three layers of gated delta rule to one of attention, experts behind each. Half as many
tokens as the demo saw would take an hour; these models know the demo's dialogues less well, and are kept nowhere.

    python scripts/hybrid_pair.py OUT

A run that was interrupted continues from its last checkpoint. Prints what each model lost on held-out dialogues.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from build_demo import SEED, Recipe, Workshop, open_workshop
from demo_dialogues import conversations
from demo_eval import mean_loss
from demo_training import CONTEXT, SHORT, VOCABULARY, Rows, encode_docs, fit
from transformers import GenerationConfig, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.utils import logging

Shape = dict[str, Any]
EXPERTS = 32
STEP_TOKENS = 2048
TARGET_STEPS, DRAFTER_STEPS = 440, 240
TARGET: Shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_experts": EXPERTS,
          "num_experts_per_tok": 4, "moe_intermediate_size": 64}  # fmt: skip
DRAFTER: Shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4,
           "num_experts_per_tok": 1, "moe_intermediate_size": 96,
           "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip


def new_model(shape: Shape, shop: Workshop) -> Qwen3NextForCausalLM:
    """An untrained model of this shape."""
    torch.manual_seed(SEED)
    heads = shape["num_attention_heads"]
    config = Qwen3NextConfig(
        **shape,
        vocab_size=VOCABULARY, intermediate_size=shape["moe_intermediate_size"], head_dim=32, num_key_value_heads=1,
        shared_expert_intermediate_size=shape["moe_intermediate_size"], max_position_embeddings=CONTEXT,
        linear_num_key_heads=heads, linear_num_value_heads=heads, linear_key_head_dim=32, linear_value_head_dim=32,
        tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=shop.tokenizer.eos_token_id, pad_token_id=shop.tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


def make(
    name: str, shape: Shape, steps: int, shop: Workshop, teacher: Qwen3NextForCausalLM | None = None
) -> Qwen3NextForCausalLM:
    """The model of that name, trained, and saved beside its tokenizer."""
    folder, model = shop.out / name, new_model(shape, shop)
    rows = Rows(shop.tokenizer, shop.docs, conversations(SEED + 1, shop.text.entries), SEED + 1)
    fit(model, rows.batches(STEP_TOKENS), steps, shop.device, shop.out / f"{name}.pt", teacher)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=shop.tokenizer.eos_token_id, pad_token_id=shop.tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    shop.tokenizer.save_pretrained(folder)
    model.eval()
    return model


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Train both, and save them as OUT/target and OUT/drafter."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shop = open_workshop(out, Recipe(), "cpu")
    target = make("target", TARGET, TARGET_STEPS, shop)
    drafter = make("drafter", DRAFTER, DRAFTER_STEPS, shop, target)
    talks = conversations(SEED + 5, shop.text.entries)
    kept = Rows(shop.tokenizer, encode_docs(shop.tokenizer, shop.text.docs_kept), talks, SEED + 5)
    batches = [kept.batch(8, SHORT, docs_share=0.0) for _ in range(4)]
    click.echo(f"target: {mean_loss(target, batches, 'cpu'):.3f} nats a token of held-out dialogues")
    click.echo(f"drafter: {mean_loss(drafter, batches, 'cpu'):.3f}")
    click.echo(f"from target to drafter: {mean_loss(drafter, batches, 'cpu', teacher=target):.3f}")


if __name__ == "__main__":
    main()
