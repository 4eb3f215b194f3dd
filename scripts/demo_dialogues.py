"""Dialogues made by rules, each kind a function of a random generator. Knows nothing of models.

The same seed and the same documented names give the same dialogues.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from demo_corpus import Entry
from demo_facts import (
    ALPHABET,
    ANIMALS,
    COLOURS,
    DAYS,
    FACTS,
    LISTS,
    MONTHS,
    NUMBERS,
    PLACES,
    THINGS,
    TOPICS,
    TRAITS,
    WORDS,
)
from demo_words import any_word, casual, invented, series


@dataclass(frozen=True)
class Turn:
    """One question and the answer we want."""

    question: str
    answer: str


Kind = Callable[[Random], list[Turn]]


def ask(rng: Random, questions: list[str], answer: str, **slots: str) -> list[Turn]:
    """One of the phrasings with its slots filled; the slots keep their spelling."""
    return [Turn(casual(rng, rng.choice(questions)).format(**slots), answer.format(**slots))]


def facts(rng: Random) -> list[Turn]:
    phrasings, answer = rng.choice(FACTS)
    # The first phrasing is the one in the README: it must be safe.
    return ask(rng, phrasings + phrasings[:1], answer)


def lists(rng: Random) -> list[Turn]:
    names, items, lead = rng.choice(LISTS)
    questions = ["List {what}.", "What are {what}?", "Name {what}.", "Tell me {what}.", "Can you list {what}?"]
    return ask(rng, questions, f"{lead} {series(items)}.", what=rng.choice(names))


def counting(rng: Random) -> list[Turn]:
    top = rng.randint(3, 30)
    pick = rng.randrange(4)
    if pick == 0:
        start = rng.randint(2, 20)
        items = [str(n) for n in range(start, start + rng.randint(3, 12))]
        return ask(
            rng, ["Count from {a} to {b}.", "Count {a} to {b}."], ", ".join(items) + ".", a=items[0], b=items[-1]
        )
    if pick == 1:
        down = ", ".join(str(n) for n in range(min(top, 20), 0, -1))
        return ask(rng, ["Count down from {n}.", "Count backwards from {n}."], down + ".", n=str(min(top, 20)))
    up = ", ".join(str(n) for n in range(1, top + 1))
    return ask(
        rng,
        ["Count to {n}.", "Count up to {n}.", "Count from 1 to {n}.", "Can you count to {n}?"],
        up + ".",
        n=str(top),
    )


def sums(rng: Random) -> list[Turn]:
    pick = rng.random()
    if pick < 0.5:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        questions = [
            "What is {a} + {b}?",
            "What is {a} plus {b}?",
            "{a} + {b}",
            "How much is {a} plus {b}?",
            "Add {a} and {b}.",
        ]
        return ask(rng, questions, f"{a} + {b} = {a + b}.", a=str(a), b=str(b))
    if pick < 0.75:
        b, rest = rng.randint(0, 10), rng.randint(0, 10)
        a = b + rest
        questions = ["What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "How much is {a} minus {b}?"]
        return ask(rng, questions, f"{a} - {b} = {rest}.", a=str(a), b=str(b))
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    questions = ["What is {a} times {b}?", "What is {a} * {b}?", "{a} times {b}", "Multiply {a} by {b}."]
    return ask(rng, questions, f"{a} times {b} is {a * b}.", a=str(a), b=str(b))


def calendar(rng: Random) -> list[Turn]:
    pick = rng.randrange(5)
    days = pick < 3
    ring, unit = (DAYS, "day") if days else (MONTHS, "month")
    here = rng.randrange(len(ring))
    name = ring[here]
    if pick in (0, 3):
        questions = [f"What {unit} comes after {{x}}?", f"Which {unit} follows {{x}}?", "What comes after {x}?"]
        return ask(rng, questions, f"{ring[(here + 1) % len(ring)]} comes after {{x}}.", x=name)
    if pick in (1, 4):
        questions = [f"What {unit} comes before {{x}}?", "What comes before {x}?"]
        return ask(rng, questions, f"{ring[here - 1]} comes before {{x}}.", x=name)
    step = rng.randint(2, 6)
    questions = ["What day is it {n} days after {x}?", "Which day is {n} days after {x}?"]
    return ask(rng, questions, f"{DAYS[(here + step) % 7]} is {{n}} days after {{x}}.", x=name, n=NUMBERS[step])


def repeating(rng: Random) -> list[Turn]:
    """Copying, the skill a drafter sees most; many words, many lengths."""
    words = [any_word(rng) for _ in range(rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8]))]
    text = " ".join(words)
    pick = rng.random()
    if pick < 0.5:
        questions = [
            "Repeat after me: {x}",
            "Say {x}",
            "Repeat: {x}",
            "Copy this: {x}",
            "Please say: {x}",
            'Repeat "{x}"',
            "Echo {x}",
        ]
        return ask(rng, questions, "{x}", x=text)
    if pick < 0.6:
        times = rng.randint(2, 4)
        short = " ".join(words[:2])
        spoken = ["twice", "three times", "four times"][times - 2]
        return ask(rng, ["Say {x} {n}.", "Repeat {x} {n}."], ", ".join([short] * times) + ".", x=short, n=spoken)
    several = words if len(words) > 1 else [*words, any_word(rng)]
    joined = " ".join(several)
    if pick < 0.7:
        return ask(
            rng,
            ["What is the first word of: {x}", "First word of: {x}"],
            "The first word is {y}.",
            x=joined,
            y=several[0],
        )
    if pick < 0.8:
        return ask(
            rng,
            ["What is the last word of: {x}", "Last word of: {x}"],
            "The last word is {y}.",
            x=joined,
            y=several[-1],
        )
    if pick < 0.9:
        return ask(
            rng, ["Reverse these words: {x}", "Say in reverse order: {x}"], "{y}", x=joined, y=" ".join(several[::-1])
        )
    return ask(
        rng,
        ["Make a list of {x}.", "List these: {x}"],
        "{y}",
        x=", ".join(several),
        y="\n".join("- " + w for w in several),
    )


def spelling(rng: Random) -> list[Turn]:
    word = rng.choice(WORDS + ANIMALS + THINGS) if rng.random() < 0.6 else invented(rng)
    if rng.random() < 0.75:
        questions = ["Spell {x}.", "Spell the word {x}.", "How do you spell {x}?"]
        return ask(rng, questions, "{x} is spelled {y}.", x=word, y="-".join(word.upper()))
    letter = rng.choice(ALPHABET)
    questions = ["Which letter comes after {x}?", "What letter follows {x}?"]
    return ask(rng, questions, "{y} comes after {x}.", x=letter, y=ALPHABET[(ALPHABET.index(letter) + 1) % 26])


def meeting(rng: Random) -> list[Turn]:
    """A name or a thing is told, something else is talked about, and then it is asked for."""
    name, colour, town = invented(rng), rng.choice(COLOURS), invented(rng)
    told = [
        ask(
            rng,
            ["My name is {x}.", "I am {x}.", "Hello, I am {x}.", "Call me {x}."],
            "Hello, {x}! Nice to meet you.",
            x=name,
        ),
        ask(
            rng,
            ["My favourite colour is {x}.", "I like the colour {x}."],
            "I will remember that you like {x}.",
            x=colour,
        ),
        ask(rng, ["I live in {x}.", "I come from {x}."], "{x} sounds like a nice place.", x=town),
    ]
    asked = [
        ask(rng, ["What is my name?", "Do you remember my name?", "Who am I?"], "Your name is {x}.", x=name),
        ask(
            rng, ["What is my favourite colour?", "Which colour do I like?"], "Your favourite colour is {x}.", x=colour
        ),
        ask(rng, ["Where do I live?", "Where do I come from?"], "You live in {x}.", x=town),
    ]
    chosen = rng.sample(range(3), rng.randint(1, 2))
    between = [turn for _ in range(rng.choice([0, 0, 1, 1, 2])) for turn in rng.choice([facts, sums, calendar])(rng)]
    return [t for i in chosen for t in told[i]] + between + [t for i in chosen for t in asked[i]]


def story(rng: Random) -> list[Turn]:
    """A grammar for small stories: open enough to differ at every temperature above zero."""
    name = invented(rng)
    hero, friend = rng.sample(ANIMALS, 2)
    place, other = rng.sample(PLACES, 2)
    thing, trait, colour = rng.choice(THINGS), rng.choice(TRAITS), rng.choice(COLOURS)
    asked = rng.random()
    questions = [
        "Tell me a story about a {hero}.",
        "Write a story about a {hero}.",
        "Tell me a story about the {hero}.",
    ]
    if asked < 0.4:
        questions = ["Tell me a story about a {hero} named {name}.", "Write a short story about {name} the {hero}."]
    elif asked < 0.6:
        questions = ["Tell me a story.", "Write a short story.", "Tell me a short story."]
    opening = ["Once there was a {trait} {hero} named {name}.", "In a {place} lived a {trait} {hero} named {name}."]
    finding = [
        "One day {name} found a {colour} {thing} in the {place}.",
        "One morning {name} lost a {colour} {thing} near the {other}.",
    ]
    asking = ['"Whose {thing} is this?" asked {name}.', "{name} looked at it for a long time."]
    meeting_ = ["A {friend} came along and knew the answer.", "Nobody knew, except the old {friend} of the {other}."]
    ending = [
        "Together they carried the {thing} to the {other}, and they were friends from that day on.",
        "They put the {thing} on the wall of the {other}, where it shines to this day.",
        "So {name} and the {friend} shared the {thing}, and everyone was happy.",
    ]
    text = " ".join(rng.choice(part) for part in (opening, finding, asking, meeting_, ending))
    slots = {"hero": hero, "friend": friend, "name": name, "place": place, "other": other}
    return ask(rng, questions, text, thing=thing, trait=trait, colour=colour, **slots)


def beyond(rng: Random) -> list[Turn]:
    """Questions the model cannot answer, and an honest answer that names the topic."""
    topic = rng.choice(TOPICS) if rng.random() < 0.6 else f"{rng.choice(WORDS)} {rng.choice(WORDS + THINGS)}"
    if rng.random() < 0.3:
        topic = invented(rng) if rng.random() < 0.6 else f"{invented(rng)} {invented(rng)}"
    questions = [
        *[
            "Tell me about {x}.",
            "What do you know about {x}?",
            "Explain {x}.",
            "What is {x}?",
            "Who is {x}?",
            "What is the capital of {x}?",
        ],
        *[
            "Write a poem about {x}.",
            "Write an essay about {x}.",
            "Why is {x} important?",
            "What do you think about {x}?",
            "How does {x} work?",
        ],
        *[
            "Give me a recipe for {x}.",
            "Translate {x} into French.",
            "Who invented {x}?",
            "Why do people like {x}?",
            "Where is {x}?",
        ],
    ]
    answer = "I do not know much about {x}. I am a toy with three million parameters; please ask a larger model."
    return ask(rng, questions, answer, x=topic)


def explaining(entries: list[Entry]) -> Kind:
    """`What does X do?` over the standard library: the name is copied, the sentence is its docstring's first."""

    def kind(rng: Random) -> list[Turn]:
        entry = rng.choice(entries)
        summary = entry.summary.replace("{", "(").replace("}", ")")
        questions = ["What does {x} do?", "What is {x}?", "Explain {x}.", "What is {x} for?", "Describe {x}."]
        return ask(rng, questions, f"`{{x}}` is a {entry.kind} of Python. {summary}", x=entry.name)

    return kind


def conversations(seed: int, entries: list[Entry]) -> Iterator[list[Turn]]:
    """An endless, reproducible supply of short conversations in fixed proportions."""
    rng = Random(seed)
    kinds: list[tuple[Kind, int]] = [
        *[(facts, 26), (lists, 9), (counting, 5), (sums, 14), (calendar, 6), (repeating, 22), (spelling, 5)],
        *[(meeting, 7), (story, 7), (beyond, 7), (explaining(entries), 8)],
    ]
    weights = [weight for _, weight in kinds]
    while True:
        (kind, _), *_ = rng.choices(kinds, weights)
        yield kind(rng)
