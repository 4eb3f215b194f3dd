"""What a grammar costs a sweep: processor time for each node of a tree, at a vocabulary of the size real models have.

    python scripts/measure_grammar.py --tokens 128000 --nodes 64

A byte-level BPE is trained on Python's own sources, so that its tokens overlap as those of real models do. A text that
follows a schema is written token by token; at every step a tree of guesses hangs below it, half of them right. Times
are of the processor, which other programs disturb little, and compared with a sweep of `--sweep` seconds.
"""

from __future__ import annotations

import json
import random
import sysconfig
import time
from pathlib import Path

import click
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from specexec.sampling.grammar import Grammars, json_schema
from specexec.sampling.params import SamplingParams
from specexec.sampling.scores import constrained
from specexec.tree.tree import ROOT, TokenTree

END = "<|end|>"
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["module", "package", "script"]},
        "lines": {"type": "integer", "minimum": 0},
        "words": {"type": "array", "items": {"type": "string"}, "maxItems": 20},
    },
    "required": ["name", "kind", "lines", "words"],
    "additionalProperties": False,
}
ANSWER = {
    "name": "A rather long name, with “quotes” and \\ in it, of the kind that people write",
    "kind": "package",
    "lines": 12345,
    "words": ["one", "two words", "three short words", "and a sentence that goes on for a while."],
}


def trained(tokens: int, files: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `tokens` tokens."""
    places = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    sources = [source for place in places for source in sorted(place.glob("**/*.py"))][:files]
    texts = (source.read_text(encoding="utf-8", errors="replace") for source in sources)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=tokens, min_frequency=1, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)


def tree_below(rest: list[int], nodes: int, vocabulary: int, dice: random.Random) -> TokenTree:
    """Half of the nodes go on as the text will, the others are anything, hung below them."""
    right = rest[: nodes // 2]
    tokens, parents = [*right], list(range(-1, len(right) - 1))
    while len(tokens) < nodes:
        tokens.append(dice.randrange(vocabulary))
        parents.append(dice.randrange(-1, len(right)))
    return TokenTree.of(tokens, parents)


@click.command()
@click.option("--tokens", default=128_000, help="Size of the vocabulary to train.")
@click.option("--nodes", default=64, help="Nodes of each tree.")
@click.option("--files", default=6000, help="Sources to train on.")
@click.option("--sweep", default=1.0, help="Seconds of a sweep to compare with.")
def measure(tokens: int, nodes: int, files: int, sweep: float) -> None:
    """Print milliseconds of processor time."""
    torch.set_num_threads(1)
    tokenizer = trained(tokens, files)
    vocabulary = len(tokenizer)
    began = time.process_time()
    grammars = Grammars(tokenizer, vocabulary, [tokenizer.eos_token_id])
    prepared_ms = 1000 * (time.process_time() - began)
    began = time.process_time()
    grammar = grammars.grammar(json_schema(SCHEMA))
    read_ms = 1000 * (time.process_time() - began)
    text = tokenizer.encode(json.dumps(ANSWER))
    dice, parse = random.Random(0), grammar.start()
    logits_NV = torch.randn(nodes + 1, vocabulary)
    at, spent_ms = 0, []
    while at < len(text):
        tree = tree_below(text[at:], nodes, vocabulary, dice)
        began = time.process_time()
        constrained(logits_NV, SamplingParams(), parse, tree, [ROOT, *range(nodes)])
        spent_ms.append(1000 * (time.process_time() - began))
        parse.advance(text[at : at + 4])
        at += 4
    mean_ms, most_ms = sum(spent_ms) / len(spent_ms), max(spent_ms)
    print(f"vocabulary {vocabulary:,}, {nodes} nodes, {len(text)} tokens of JSON, {len(spent_ms)} trees")
    print(f"tokenizer prepared in {prepared_ms:.0f} ms, once; schema read in {read_ms:.1f} ms")
    print(f"a node: {mean_ms / (nodes + 1):.2f} ms, its mask made and applied")
    print(f"a tree: {mean_ms:.1f} ms, at most {most_ms:.1f}")
    print(f"of a sweep of {sweep:g} s: {mean_ms / sweep / 10:.1f} %, at most {most_ms / sweep / 10:.1f} %")


if __name__ == "__main__":
    measure()
