"""Ordinary prompts for a small chat model, drawn by rule: a kind of question about a thing. Always the same ones.

`python scripts/ordinary_prompts.py FOLDER` writes train.jsonl, half to be answered at temperature 0 and half at 0.8,
and held_out.txt: 40 prompts about other things, a kind of question each that train.jsonl has not either.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 17
TEACHING = (
    "Explain {} to a child.", "What is {}?", "Give me three facts about {}.", "Write a short paragraph about {}.",
    "Why is {} important?", "List the advantages and disadvantages of {}.", "How does {} work?",
    "Give me five tips about {}.", "Write a short story about {}.", "What should a beginner know about {}?",
    "Summarise the history of {} in a few sentences.", "Describe {} in simple words.",
    "Write a short poem about {}.", "What are common mistakes with {}?", "How can I learn more about {}?",
)  # fmt: skip
ASKING = (
    "What would you tell a friend about {}?", "Write an email that invites colleagues to a talk about {}.",
    "Name some questions that people ask about {}, and answer them.", "How has {} changed over time?",
)  # fmt: skip
THINGS = (
    "photosynthesis", "the Roman Empire", "bread baking", "electric cars", "black holes", "gardening", "chess",
    "the water cycle", "learning a language", "vaccines", "the moon", "budgeting", "yoga", "volcanoes", "bees",
    "solar power", "public libraries", "jazz", "the French Revolution", "cooking rice", "meditation", "cats",
    "the internet", "trains", "hiking", "whales", "job interviews", "tea", "the heart", "recycling", "mountains",
    "photography", "democracy", "dreams", "sleep", "swimming", "the printing press", "rain forests", "coffee",
    "computer programs", "saving money", "the stock market", "planets", "good manners", "earthquakes", "painting",
    "first aid", "wind turbines", "teamwork", "time management", "dinosaurs", "the human brain", "cheese", "robots",
    "public speaking", "the Great Wall of China", "gravity", "friendship", "writing a letter", "the ocean",
    "healthy food", "bicycles", "music lessons", "the telescope", "camping", "birds", "stress", "maps", "honey",
    "city parks", "antibiotics", "wolves", "ice cream", "the Olympic Games", "deserts", "running", "reading",
    "batteries", "the calendar", "kindness", "knitting", "electricity", "the immune system", "bridges", "rivers",
    "planning a trip", "pottery", "the alphabet", "storms", "dogs", "exercise", "airplanes", "museums", "stars",
    "the Silk Road", "glass", "puzzles", "trees", "salt", "laughter",
)  # fmt: skip
OTHER_THINGS = (
    "elephants", "the piano", "clouds", "lighthouses", "paper", "fishing", "the violin", "castles", "penguins", "sugar",
)  # fmt: skip


def teaching() -> list[dict[str, object]]:
    """All kinds of questions about all things, mixed."""
    asked = [form.format(thing) for form in TEACHING for thing in THINGS]
    random.Random(SEED).shuffle(asked)
    return [{"id": f"{number}", "prompt": one, "temperature": 0.8 * (number % 2)} for number, one in enumerate(asked)]


def held_out() -> list[str]:
    """Forty that have neither kind nor thing in common with those."""
    return [form.format(thing) for form in ASKING for thing in OTHER_THINGS]


def main(folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(one) + "\n" for one in teaching())
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    (folder / "held_out.txt").write_text("\n".join(held_out()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
