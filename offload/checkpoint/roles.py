"""Which part of a model a tensor belongs to, by its name: a layer, the head, the embeddings or the rest.

And how many layers a config counts for one.
"""

import re

PARTS = ("head", "embeddings", "lookups", "norms")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.")
# The matrix in which token ids are looked up; positions and projections beside it are computed with.
PER_LAYER = re.compile(r"(^|\.)embed_tokens_per_layer\.weight$")
LOOKUP = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte)\.weight$")


def part_of(name: str) -> str:
    """`head`, `embeddings`, `lookups` or `norms`: the kind of a tensor outside the layers; the last kind is small.

    `lookups` are looked up by token id like embeddings, but are never a head: rows for each layer.
    """
    if PER_LAYER.search(name):
        return "lookups"
    if HEAD.search(name):
        return "head"
    return "embeddings" if LOOKUP.search(name) else "norms"


def attentions(model_type: object) -> int:
    """How often one layer attends: its caches are numbered, and its config counts it, as so many. LongCat's twice."""
    return 2 if model_type == "longcat_flash" else 1
