"""The picture of a sweep: accepted path, rejected siblings, the target's own word, at any width."""

from __future__ import annotations

import numpy as np
from rich.cells import cell_len

from cli.terminal.treeview import draw, readable
from specexec.stats import Burst, Cost
from specexec.tree.tree import ROOT, TokenTree

WORDS = [" waves", " is", " light", " are", " scattered", " far", " more", " much", "er", "\n", ""]


def decode(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def burst(parents: list[int], tokens: list[int], path: tuple[int, ...], written: tuple[int, ...]) -> Burst:
    return Burst(written, decode(list(written)), None, TokenTree.of(tokens, parents), path, seed=0, cost=Cost())


SWEEP = burst(
    parents=[ROOT, ROOT, ROOT, ROOT, 0, 4, 4, 6], tokens=[0, 1, 2, 5, 3, 4, 5, 6], path=(0, 4, 5), written=(0, 3, 4, 7)
)


def test_the_accepted_path_stands_above_two_rejected_siblings_at_most() -> None:
    assert draw(SWEEP, decode, 80, 9).splitlines() == [
        "sweep 9 · 8 guessed · depth 4 · accepted 3 + 1",
        " ▸ ·waves 100% ▸ ·are 100% ▸ ·scattered 100% │ ·much ← target",
        " ├ ·is 100%                └ ·far 100%",
        " └ ·light 100%",
    ]


def test_a_narrow_terminal_gets_several_blocks() -> None:
    lines = draw(SWEEP, decode, 48, 9).splitlines()[1:]
    assert lines == [
        " ▸ ·waves 100% ▸ ·are 100% ▸ ·scattered 100%",
        " ├ ·is 100%                └ ·far 100%",
        " └ ·light 100%",
        " │ ·much ← target",
    ]
    assert all(cell_len(line) < 48 for line in lines)


def test_every_guess_shows_its_chance_and_who_made_it() -> None:
    tree = TokenTree(
        np.array([0, 1, 2]), np.array([ROOT, ROOT, 0]), np.log([0.6, 0.25, 0.3]), origin_N=np.array([0b11, 0b01, 0b10])
    )
    joined = Burst((0, 3), "", None, tree, (0,), seed=0, cost=Cost())
    assert draw(joined, decode, 80, 1, "small+ngram").splitlines() == [
        "sweep 1 · 3 guessed · depth 2 · accepted 1 + 1 · ¹ small ² ngram",
        " ▸ ·waves¹² 60% │ ·are ← target",
        " └ ·is¹ 25%     └ ·light² 50%",
    ]
    assert "¹" not in draw(joined, decode, 80, 1, "small")


def test_plain_decoding_shows_the_targets_word_alone() -> None:
    assert draw(burst([], [], (), (7,)), decode, 80, 1).splitlines() == [
        "sweep 1 · 0 guessed · depth 0 · accepted 0 + 1",
        " │ ·much ← target",
    ]


def test_a_text_that_ends_inside_the_tree_has_no_word_of_the_targets() -> None:
    ended = burst([ROOT, 0, 1], [0, 10, 1], (0, 1), (0, 10))
    assert draw(ended, decode, 80, 2).splitlines()[1:] == [" ▸ ·waves 100% ▸ <end> 100%"]


def test_tokens_are_readable() -> None:
    assert [readable(text) for text in (" word", "er", "\n\n", "\t", "", "\x1b[31m", "x" * 40)] == [
        "·word", "er", "⏎⏎", "⇥", "<end>", "�[31m", "x" * 15 + "…",
    ]  # fmt: skip
