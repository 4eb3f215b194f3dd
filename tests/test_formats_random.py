"""Whatever a model writes, reading it ends, and the pieces add up to the same in any chunking."""

import json
import random
from functools import cache

import pytest

from specexec.text.formats import Format, Piece, format_of
from specexec.text.formats.probe import Shown
from specexec.text.reply import Reply
from specexec.text.tokenizer import Encoding
from tests.families import family
from tests.test_formats_table import READ, known

ONE_OF_EACH = {form: template for template, form in READ.items()}
ANSWERS = 12  # of each form


def shuffled(ids: list[int], marks: list[int], chance: random.Random) -> list[int]:
    """Slices of what the family writes, in disorder, with marks strewn in."""
    written: list[int] = []
    for _ in range(chance.randint(1, 5)):
        first = chance.randrange(len(ids))
        written += ids[first : first + chance.randint(1, 20)] + chance.choices(marks, k=chance.randint(0, 2))
    return written


def in_chunks(form: Format, prompt: list[int], ids: list[int], chance: random.Random) -> Piece:
    reader, piece = form.reader(prompt), Piece()
    while ids:
        size = chance.randint(0, min(4, len(ids)))
        piece += reader.read(ids[:size], last=False)
        ids = ids[size:]
    return piece + reader.read([], last=True)


def told(piece: Piece) -> tuple[str, str, list[tuple[str, str]]]:
    """All but the ids of calls, which may be drawn anew."""
    return piece.content, piece.reasoning, [(call.name, call.arguments) for call in piece.calls]


@cache
def written_by(template: str) -> tuple[Format, Shown]:
    """A family's form, and an answer with calls as its template writes it."""
    _, form, probe = known(template)
    shown = probe.answer(calls=2 if form.parallel else 1)
    assert shown is not None
    return form, shown


def test_any_answer_is_read_to_its_end_and_the_same_in_any_chunking() -> None:
    chance = random.Random(0)
    for template in ONE_OF_EACH.values():
        form, shown = written_by(template)
        encoding = form.encoding
        assert isinstance(encoding, Encoding)
        prompt, ids = encoding.encode_rest(shown.prompt), encoding.encode_rest(shown.answer)
        marks = sorted(form.control_tokens.intersection([*prompt, *ids])) or ids[:1]
        for _ in range(ANSWERS):
            written = shuffled(ids, marks, chance)
            whole = form.reader(prompt).read(written, last=True)
            assert told(in_chunks(form, prompt, written, chance)) == told(whole), (template, written)


def test_a_harmony_answer_cut_anywhere_goes_on_as_if_it_had_not_been_cut() -> None:
    encoding = family("llama_cpp/openai-gpt-oss-120b")
    form = format_of(encoding)
    prompt = encoding.encode([{"role": "user", "content": "hi"}])
    text = "<|channel|>analysis<|message|>Greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
    ids = encoding.encode_rest(text)
    for cut in range(len(ids) + 1):
        reply = Reply(form, prompt, ids[:cut])
        reply.add(ids[cut:], last=True)
        assert reply.message == {"role": "assistant", "content": "Hello!", "reasoning_content": "Greet."}, cut


# In the place of a number: what JSON has not, what no text can hold, and what is nested deeper than anything is read.
HOSTILE = ["1e999", "NaN", r'"\ud800"', r'"\udfff"', f"{'[' * 1500}{']' * 1500}", f"{'x.' * 500}x", "9" * 4400]


def test_values_that_json_cannot_hold_are_no_error_and_no_mark() -> None:
    for template in ONE_OF_EACH.values():
        form, shown = written_by(template)
        encoding = form.encoding
        assert isinstance(encoding, Encoding)
        prompt = encoding.encode_rest(shown.prompt)
        marks = {text for text in encoding.tokenizer.get_added_vocab() if text.strip()}
        for value in HOSTILE:
            ids = encoding.encode_rest(shown.answer.replace("-2.5", value))
            piece = form.reader(prompt).read(ids, last=True)
            assert (piece.content + piece.reasoning + str(piece.calls)).encode(), (template, value)
            for call in piece.calls:
                ratio = json.loads(call.arguments, parse_constant=pytest.fail).get("ratio")
                assert not (isinstance(ratio, str) and ratio in marks), (template, value)
