"""Which search grows the better tree over one tri-gram table: ADED's Monte Carlo tree search, or best-first growth?

ADED (Liu et al. 2025) guesses by a table of tri-grams and searches it: 150 rollouts of at most four tokens, children
chosen by PUCT, the 24 best paths become the tree. Here its search and best-first growth are given the same table, made
of three of four pages of docs/, and as many nodes; at places of the other pages. Prints for both the mean number of
tokens that the text really goes on with, what the table itself expects, and milliseconds (both are plain Python).

    python scripts/measure_aded.py
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
KEPT, ROLLOUTS, LENGTH, PATHS = 12, 150, 4, 24  # as published
C_1, C_2 = 32.0, 8.0
Pair = tuple[int, int]
Branch = tuple[int, ...]
Table = Mapping[Pair, Mapping[int, float]]
Tree = dict[Branch, float]
"""Paths below a place, each with the product of the table's chances along it; closed under prefixes."""


def table_of(texts: Iterable[list[int]]) -> Table:
    """The KEPT likeliest tokens behind each pair, and how often they came."""
    counts: defaultdict[Pair, Counter[int]] = defaultdict(Counter)
    for text in texts:
        for first, second, third in zip(text, text[1:], text[2:], strict=False):
            counts[first, second][third] += 1
    return {
        pair: {token: count / found.total() for token, count in found.most_common(KEPT)}
        for pair, found in counts.items()
    }


def best_first(table: Table, start: Pair, nodes: int, deepest: int) -> Tree:
    """The `nodes` likeliest paths."""
    tree: Tree = {}
    waiting: list[tuple[float, Branch]] = [(-1.0, ())]
    while waiting and len(tree) <= nodes:
        chance, path = heapq.heappop(waiting)
        tree[path] = -chance
        if len(path) < deepest:
            for token, own in table.get(_end(start, path), {}).items():
                heapq.heappush(waiting, (chance * own, (*path, token)))
    del tree[()]
    return tree


@dataclass
class Place:
    """A node of the search."""

    path: Branch
    chance: float
    children: list[Place] = field(default_factory=list)
    visits: int = 0
    score: float = 0.0

    def worth(self, parents: int) -> float:
        """PUCT; a child that was never visited comes first."""
        if not self.visits:
            return math.inf
        spread = C_1 + math.log((parents + C_2 + 1) / C_2)
        return self.score / self.visits + spread * self.chance * math.sqrt(parents) / (1 + self.visits)


def monte_carlo(table: Table, start: Pair, rng: random.Random) -> Tree:
    """ADED's search; each of its best paths goes on with its likeliest next token."""
    root = Place((), 0.0)
    for _ in range(ROLLOUTS):
        line = [root]
        while line[-1].children and len(line) < LENGTH:
            parents = line[-1].visits
            line.append(max(line[-1].children, key=lambda child: child.worth(parents)))
        if len(line) < LENGTH and not line[-1].children:
            path = line[-1].path
            line[-1].children = [Place((*path, one), own) for one, own in table.get(_end(start, path), {}).items()]
            line += line[-1].children[-1:]
        path = line[-1].path
        while len(path) < LENGTH - 1 and (following := table.get(_end(start, path))):
            path = (*path, rng.choices([*following], [*following.values()])[0])
        score = 1.0 + sum(table[_end(start, path[:at])][token] for at, token in enumerate(path))
        for place in line:
            place.visits += 1
            place.score += score
    ends = sorted(_ends(root), key=lambda place: place.score, reverse=True)[:PATHS]
    tree: Tree = {}
    for place in ends:
        path = place.path
        if following := table.get(_end(start, path)):
            path = (*path, max(following, key=lambda token: following[token]))
        chance = 1.0
        for at, token in enumerate(path):
            chance *= table[_end(start, path[:at])][token]
            tree[path[: at + 1]] = chance
    return tree


def _ends(place: Place) -> list[Place]:
    return [end for child in place.children for end in _ends(child)] if place.children else [place]


def _end(start: Pair, path: Branch) -> Pair:
    first, second = (*start, *path)[-2:]
    return first, second


def followed(tree: Tree, text: list[int]) -> int:
    """Tokens of the text that the tree has."""
    return max((len(path) for path in tree if list(path) == text[: len(path)]), default=0)


@click.command()
@click.option("--places", default=400, show_default=True)
def main(places: int) -> None:
    """Compare the two searches."""
    rng = random.Random(0)
    tokenizer = Tokenizer.from_file(str(ROOT / "offload" / "demo" / "target" / "tokenizer.json"))
    pages = sorted((ROOT / "docs").rglob("*.md"))
    texts = [tokenizer.encode(page.read_text(encoding="utf-8")).ids for page in pages]
    table = table_of(text for number, text in enumerate(texts) if number % 4)
    asked = [
        (text, at) for text in texts[::4] for at in range(2, len(text) - LENGTH - 1)
        if (text[at - 2], text[at - 1]) in table
    ]  # fmt: skip
    asked = rng.sample(asked, min(places, len(asked)))
    trees: dict[str, list[Tree]] = {"Monte Carlo tree search": [], "best-first": []}
    seconds = dict.fromkeys(trees, 0.0)

    def timed(name: str, grow: Callable[[], Tree]) -> Tree:
        began = time.perf_counter()
        trees[name].append(grow())
        seconds[name] += time.perf_counter() - began
        return trees[name][-1]

    for text, at in asked:
        start = (text[at - 2], text[at - 1])
        theirs = timed("Monte Carlo tree search", partial(monte_carlo, table, start, rng))
        timed("best-first", partial(best_first, table, start, len(theirs), LENGTH))
    click.echo(f"{len(asked)} places, {sum(map(len, trees['best-first'])) / len(asked):.1f} nodes each\n")
    click.echo("| search | tokens that the text goes on with | that the table expects | ms |")
    click.echo("|---|---|---|---|")
    for name, grown in trees.items():
        hits = sum(followed(tree, text[at:]) for tree, (text, at) in zip(grown, asked, strict=True)) / len(asked)
        expected = sum(sum(tree.values()) for tree in grown) / len(asked)
        click.echo(f"| {name} | {hits:.3f} | {expected:.3f} | {1000 * seconds[name] / len(asked):.2f} |")


if __name__ == "__main__":
    main()
