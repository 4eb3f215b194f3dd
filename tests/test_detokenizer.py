"""Streamed text equals the whole decode for every real tokenizer, whatever the ids, and goes on where a prompt ends."""

import random

import pytest

from specexec.text.detokenizer import TextStream
from tests import real

TEXT = "Grüße, 世界! 🙂👩‍👩‍👧 \n\n  def f(x):\n\treturn x  # ½ ≠ ∞ \U00013000 naïve… end. " * 3
SEQUENCES = 1500


def streamed(stream: TextStream, tokens: list[int], dice: random.Random) -> str:
    text = ""
    for token in tokens:
        stream.add(token)
        if dice.random() < 0.5:
            text += stream.take(last=False)
    return text + stream.take(last=True)


@pytest.mark.parametrize("name", real.TOKENIZERS)
def test_random_ids_stream_to_what_decoding_all_gives(name: str) -> None:
    of, dice = real.encoding(name), random.Random(name)
    size, special, single = len(of.tokenizer), of.tokenizer.all_special_ids, sorted(of._single_bytes)
    differing = 0
    for _ in range(SEQUENCES):
        kinds = [range(size), range(300), special or range(size), single or range(300)]
        weights = [12, 2, 1, 4]
        tokens = [dice.choice(kind) for kind in dice.choices(kinds, weights, k=dice.randint(1, 24))]
        differing += streamed(of.stream([]), tokens, dice) != of.decode(tokens)
    assert differing == 0


@pytest.mark.parametrize("name", real.TOKENIZERS)
def test_real_text_comes_as_it_is_written(name: str) -> None:
    of, dice = real.encoding(name), random.Random(1)
    tokens = of.encode_rest(TEXT)
    assert streamed(of.stream([]), tokens, dice) == of.decode(tokens) == TEXT


@pytest.mark.parametrize("name", real.TOKENIZERS)
def test_a_text_cut_anywhere_between_words_goes_on_with_its_blank(name: str) -> None:
    of, dice = real.encoding(name), random.Random(1)
    tokens = of.encode(TEXT)
    for cut in range(1, len(tokens) - 1):
        before, after = tokens[:cut], tokens[cut:]
        if not (head := of.decode(before)).endswith("\ufffd") and TEXT.startswith(head):
            assert head + streamed(of.stream(before), after, dice) == TEXT
            assert head + of.answer(before, after) == TEXT


def test_the_first_word_after_a_control_token_has_no_blank_of_the_tokenizer() -> None:
    of = real.encoding("llama2")
    prompt = of.encode_rest("</s>")
    tokens = of.encode_rest("</s>Hello")[len(prompt) :]
    assert of.answer(prompt, tokens) == "Hello"
    assert of.answer(of.encode_rest("[/INST]"), of.encode_rest("Hello")) == " Hello"


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_a_decoder_is_asked_for_few_tokens_at_a_time(name: str) -> None:
    of, asked = real.encoding(name), 0

    def decode(tokens: list[int]) -> str:
        nonlocal asked
        asked += len(tokens)
        return of.decode(tokens)

    tokens = of.encode_rest(TEXT * 10)
    stream = TextStream(decode, single_bytes=of._single_bytes)
    assert streamed(stream, tokens, random.Random(1)) == TEXT * 10
    assert asked < 25 * len(tokens)


def test_control_tokens_without_end_cost_no_more_each() -> None:
    of, longest = real.encoding("llama2"), 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return of.decode(tokens)

    stream = TextStream(decode, single_bytes=of._single_bytes)
    for token in [*of.encode_rest("Hello"), *[of.tokenizer.eos_token_id] * 1000]:
        stream.add(token)
    assert longest < 10
