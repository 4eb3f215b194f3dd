"""The model card of the demo pair, with the figures of its build. Knows no files."""

from collections.abc import Mapping, Sequence

TEXT = """# The demo pair

A toy target model ({target_size:.1f} M parameters) and its drafter ({drafter_size:.1f} M), shipped so that every
part of specexec can run for real on a bare machine: weights stream, a tree is drafted, the target checks it.
**It is not for answers.** Outside the questions below it is fluent and wrong, and many of its good answers are
templates that it knows by heart.

* Architecture: Llama, grouped queries, heads 32 wide, context 2048, bf16. Loads with plain transformers.
* Tokenizer: byte-level BPE, 4096 tokens, digits alone, `<|user|> <|assistant|> <|system|> <|end|>`.
* Data: docstrings of Python's standard library and the language reference that comes with it (Python Software
  Foundation License, see NOTICE), and dialogues made by rules of ours (Apache-2.0). Nothing else.
* Made by `scripts/build_demo.py`; MANIFEST.json holds versions, steps, losses and the hash of every file.
* The drafter was distilled from the target on the same texts and on {written} answers that the target wrote.
* Licence of the weights: Apache-2.0, with the notice kept in NOTICE.

## Figures (of this build, held-out text, float32)

| | parameters | steps | tokens trained | val loss dialogues | val loss docs | KL to target, dialogues |
|---|---:|---:|---:|---:|---:|---:|
{rows}

Losses are nats per token; of dialogues only the answers count. A weak and a strong
drafter can be built by the script for measurements; they are not shipped.

| greedy, word for word | right |
|---|---:|
| golden prompts | {golden} |
| copying of invented names never seen in training | {copying} |
| sums a + b up to 20 + 20 (most seen in training) | {sums} |

Missed golden candidates: {missed}.

## Golden prompts

These are answered exactly, and a test checks it:

{prompts}
"""


def share(score: Mapping[str, int]) -> str:
    return f"{score['right']} of {score['of']}"


def card(
    models: Mapping[str, Mapping[str, float]],
    scores: Mapping[str, Mapping[str, int]],
    missed: Sequence[str],
    golden: Sequence[Mapping[str, str]],
    written: int,
) -> str:
    """The card in Markdown."""
    rows = [
        f"| {name} | {m['parameters']:,} | {m['steps']} | {m['tokens']:,} "
        f"| {m['val_dialogues']:.3f} | {m['val_docs']:.3f} | {m['kl_dialogues']:.3f} |"
        for name, m in models.items()
    ]
    return TEXT.format(
        target_size=models["target"]["parameters"] / 1e6,
        drafter_size=models["drafter"]["parameters"] / 1e6,
        rows="\n".join(rows),
        golden=share(scores["golden_prompts"]),
        copying=share(scores["copying_unseen_names"]),
        sums=share(scores["small_sums"]),
        missed=", ".join(f"`{prompt}`" for prompt in missed) or "none",
        prompts="\n".join(f"* {each['prompt']}" for each in golden),
        written=written,
    )
