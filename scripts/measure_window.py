"""What a drafter's window saves and costs (--draft-window).

Time: one pass of a drafter model over --rows guesses below texts of several lengths, the whole text in sight and with a
window, in turns; and the bytes of its keys and values. Those of the text are copies of a few that were computed: how
long a pass takes does not depend on them. Guesses: a model drafts for itself behind the beginning of a long file.

    python scripts/measure_window.py --contexts 1k,4k,16k --windows 512,2048
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
import torch
from real_material import model as real_model

from cli.shared.options import COUNT
from offload.model.load import load as load_model
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.model.cache import KVCache, LayerKV
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.sizes import GROWTH_ROWS, SINKS
from specexec.text.detokenizer import TextStream
from specexec.text.sequence import start
from specexec.text.tokenizer import Encoding

SAMPLE = 64  # tokens that are computed


def counts(text: str) -> list[int]:
    """Of a comma list, such as 1k,4k."""
    return [COUNT.convert(part, None, None) for part in text.split(",")]


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="The model. Default: SmolLM2-135M.")
@click.option("--contexts", default="1k,4k,16k", show_default=True, help="Tokens of the text. Comma list.")
@click.option("--windows", default="512,2048", show_default=True, help="Comma list.")
@click.option("--rows", default=16, show_default=True, help="Guesses of a pass.")
@click.option("--turns", default=5, show_default=True)
@click.option("--text", type=click.Path(path_type=Path), default=Path("docs/drafters.md"), show_default=True)
@click.option("--read", default=1500, show_default=True, help="Tokens of that file; 0: do not try guesses.")
@click.option("--tokens", default=32, show_default=True, help="New tokens behind it.")
def main(
    folder: Path | None, contexts: str, windows: str, rows: int, turns: int, text: Path, read: int, tokens: int
) -> None:
    """Measure --draft-window."""
    path = folder or real_model()
    target = TreeLM(load_model(path, "none", dtype=torch.bfloat16))
    drafter, seen = target.alike(target.model), [None, *counts(windows)]
    click.echo("| text | window | pass, ms (median, range) | keys and values, MB |\n|---|---|---|---|")
    for context in counts(contexts):
        caches = {window: filled(drafter, context, window) for window in seen}
        took: dict[int | None, list[float]] = {window: [] for window in seen}
        for _ in range(turns):
            for window, cache in caches.items():
                took[window].append(pass_ms(drafter, cache, rows))
        for window, cache in caches.items():
            times = took[window]
            speed = f"{statistics.median(times):.0f} ({min(times):.0f}–{max(times):.0f})"
            held_MB = cache.rows * token_B(cache) / 1e6
            click.echo(f"| {context} | {window or 'all'} | {speed} | {held_MB:.1f} |")
    if not read:
        return
    prompt = Encoding.of(path).encode(text.read_text(encoding="utf-8"))[:read]
    click.echo(f"\n| window | tokens a sweep behind {len(prompt)} tokens | text |\n|---|---|---|")
    plain: list[int] = []
    for window in seen:
        itself = SiblingDrafter(drafter, target.vocabulary, Ranking(), window=window)
        written, sweeps = answer(target, itself, prompt, tokens)
        plain = plain or written
        same = "the same" if written == plain else "another"
        click.echo(f"| {window or 'all'} | {len(written) / sweeps:.2f} | {same} |")


def filled(lm: TreeLM, context: int, window: int | None) -> KVCache:
    """What a drafter keeps of a text of so many tokens, one that has just dropped nothing."""
    cache = KVCache()
    lm.forward([Rows.text(cache, range(100, 100 + SAMPLE))])
    cache.commit(range(SAMPLE))
    kept = context if window is None else min(context, SINKS + window + GROWTH_ROWS - 1)
    for layer, kv in cache.layers.items():
        copies_R = torch.arange(kept) % SAMPLE
        cache.layers[layer] = LayerKV(kv.keys_HRD[:, copies_R], kv.values_HRD[:, copies_R])
    cache.tokens, cache.dropped = [100] * context, context - kept
    return cache


def token_B(cache: KVCache) -> int:
    """Bytes of one row in all layers."""
    return sum(2 * kv.keys_HRD[:, 0].nbytes for kv in cache.layers.values())


def pass_ms(lm: TreeLM, cache: KVCache, rows: int) -> float:
    """Of so many guesses, all of them first ones."""
    began = time.perf_counter()
    lm.forward([Rows(cache, range(200, 200 + rows), [-1] * rows)])
    took_ms = 1000 * (time.perf_counter() - began)
    cache.forget_nodes()
    return took_ms


def answer(target: TreeLM, drafter: SiblingDrafter, prompt: list[int], tokens: int) -> tuple[list[int], int]:
    """A greedy text, and the sweeps that it took behind the first."""
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
    noise = Noise(0, target.vocabulary)
    sequence = start(prompt, sampling, noise, TextStream(lambda _: "", ()), frozenset(), len(prompt) + tokens + 1)
    decoder, sweeps = Decoder(target, drafter, BestFirst(), 8), 0
    decoder.join(sequence)
    while decoder.live:
        decoder.step()
        sweeps += 1
    return sequence.answer, sweeps


if __name__ == "__main__":
    main()
