"""What the demo model may know: fixed answers, lists and word stocks. Data only; the rules are in demo_corpus.py."""

import tomllib
from pathlib import Path


def words(text: str, sep: str = " ") -> list[str]:
    return text.split(sep)


# (ways to ask, the one answer).
FACTS: list[tuple[list[str], str]] = [
    (fact["asked"], fact["answer"])
    for fact in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["fact"]
]

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
ALPHABET = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

# (what it is called in a question, its items, the lead of the answer)
LISTS: list[tuple[list[str], list[str], str]] = [
    (["the days of the week", "the weekdays", "all days of the week"], DAYS, "The days of the week are"),
    (["the months of the year", "the months", "all twelve months"], MONTHS, "The months of the year are"),
    (["the seasons", "the four seasons"], words("spring summer autumn winter"), "The seasons are"),
    (
        ["the planets", "the planets of the solar system", "all planets"],
        words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"),
        "The planets are",
    ),
    (
        ["the colours of the rainbow", "the rainbow colors", "the colors of the rainbow"],
        words("red orange yellow green blue indigo violet"),
        "The colours of the rainbow are",
    ),
    (["the letters of the alphabet", "the alphabet", "all letters"], ALPHABET, "The letters of the alphabet are"),
    (["the vowels", "all vowels"], list("AEIOU"), "The vowels are"),
    (
        ["the continents", "all continents"],
        ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
        "The continents are",
    ),
    (["the four directions", "the points of the compass"], words("north east south west"), "The directions are"),
    (
        ["the commands of specexec", "the main commands"],
        words("chat generate plan models doctor bench"),
        "Some commands are",
    ),
    (["the drafters", "all drafters"], words("sibling ngram substitute skip"), "The drafters are"),
]

# Stocks for sentences and stories.
ANIMALS = words("fox owl cat dog hare bear mouse crow snail goat heron otter badger toad horse swan")
PLACES = words("forest library harbour garden valley tower market mill meadow island lighthouse village")
THINGS = words("lantern map key bell kite book coin drum ladder mirror basket compass button letter spoon clock")
TRAITS = words("small clever quiet brave curious patient old cheerful careful hungry sleepy gentle")
COLOURS = words("red blue green yellow white black brown grey orange purple")
WORDS = words(
    "apple river stone cloud paper silver window yellow garden winter bottle music copper pencil mountain "
    "candle button forest island morning rocket summer table thunder violin whisper circle dragon engine "
    "feather ginger hammer insect jacket kitten lemon magnet needle ocean pepper quartz rabbit sailor ticket "
    "umbrella velvet walnut zebra bridge castle desert eagle flower grape honey ivory jungle knight ladder "
    "marble noodle orchid planet queen ribbon shadow"
)
TOPICS = words(
    "the history of Rome, the weather, football, cooking rice, quantum physics, the stock market, cats, "
    "dinosaurs, the moon, love, politics, music, the ocean, coffee, bicycles, chess, volcanoes, the meaning of "
    "life, art, medicine, cars, trees in Norway, the speed of light, the French Revolution, black holes, "
    "gardening, tax law, bread, whales, money, the internet, history, philosophy, mathematics, the sun, the "
    "universe, tea, dreams, time travel, Shakespeare, Einstein, New York, London, Paris, China",
    sep=", ",
)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Be brief.",
    "Answer in plain English.",
]
