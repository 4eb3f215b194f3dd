"""Words to copy (an eighth of the invented names is never shown in training) and how people type."""

import zlib
from random import Random

from demo_facts import ANIMALS, COLOURS, PLACES, THINGS, TRAITS, WORDS


def held_out(name: str) -> bool:
    """True for the eighth of all invented names that training never shows: they test copying."""
    return zlib.crc32(name.lower().encode()) % 8 == 0


def invented(rng: Random, unseen: bool = False) -> str:
    """A pronounceable name that no dictionary has."""
    while True:
        syllables = (rng.choice("bdfgjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        name = ("".join(syllables) + rng.choice(["", "", "n", "r", "k", "l", "s", "x"])).capitalize()
        if held_out(name) == unseen:
            return name


def any_word(rng: Random) -> str:
    """A word to copy: known, coloured, invented or a number."""
    pick = rng.random()
    if pick < 0.45:
        return rng.choice(WORDS)
    if pick < 0.6:
        return rng.choice(ANIMALS + THINGS + PLACES + COLOURS + TRAITS)
    if pick < 0.9:
        return invented(rng) if rng.random() < 0.5 else invented(rng).lower()
    return str(rng.randint(0, 999))


def series(items: list[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1]


def casual(rng: Random, text: str) -> str:
    """The same question as people type it: sometimes in lower case, without its mark, or with a please."""
    pick = rng.random()
    if pick < 0.12:
        return text.lower().rstrip("?.!")
    if pick < 0.18:
        return text.rstrip("?.!")
    if pick < 0.22:
        return text.lower()
    if pick < 0.25:
        return "Please " + text[0].lower() + text[1:]
    return text
