"""What is shown burst by burst adds up to the decoded answer: whole characters, and nothing of a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from specexec.text.detokenizer import TextStream


def decode_bytes(tokens: list[int]) -> str:
    """A byte-level vocabulary."""
    return bytes(tokens).decode("utf-8", errors="replace")


def shown(tokens: list[int], bursts: list[int], stop: tuple[str, ...] = ()) -> str:
    stream, text, at = TextStream(decode_bytes, stop), "", 0
    for size in bursts:
        for token in tokens[at : at + size]:
            if stream.add(token):
                return text + stream.take(last=True)
        at += size
        text += stream.take(last=False)
    return text + stream.take(last=True)


@given(st.text(max_size=30), st.lists(st.integers(1, 5), min_size=0, max_size=200))
def test_bursts_add_up_to_the_text(text: str, bursts: list[int]) -> None:
    tokens = list(text.encode())
    bursts = [*bursts, max(len(tokens) - sum(bursts), 0)]
    assert shown(tokens, bursts) == text


@given(st.lists(st.integers(0, 255), max_size=40), st.lists(st.integers(1, 4), min_size=40, max_size=40))
def test_any_bytes_add_up_to_what_decoding_all_gives(tokens: list[int], bursts: list[int]) -> None:
    assert shown(tokens, bursts) == decode_bytes(tokens)


def test_half_a_character_waits() -> None:
    stream = TextStream(decode_bytes)
    first, *rest = "é".encode()
    stream.add(first)
    assert stream.take(last=False) == ""
    for byte in rest:
        stream.add(byte)
    assert stream.take(last=False) == "é"


@given(st.lists(st.integers(1, 6), min_size=30, max_size=30))
def test_a_stop_string_cuts_wherever_bursts_fall(bursts: list[int]) -> None:
    tokens = list(b"one two END three")
    assert shown(tokens, bursts, stop=("END",)) == "one two "
    assert shown(tokens, bursts, stop=("thre", "END", "ENDS")) == "one two "
    assert shown(tokens, bursts, stop=("ENDS",)) == "one two END three"
