"""Which part of a model a tensor belongs to, by its name: a layer, the head, the embeddings or the rest."""

import re

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.")
# The matrix in which token ids are looked up; positions and projections beside it are computed with.
LOOKUP = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte)\.weight$")


def part_of(name: str) -> str:
    """`head`, `embeddings` or `norms`: the kind of a tensor outside the layers; what is none of the others is small."""
    if HEAD.search(name):
        return "head"
    return "embeddings" if LOOKUP.search(name) else "norms"
