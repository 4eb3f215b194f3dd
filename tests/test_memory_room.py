"""Sums about memory: what is promised to texts and their guesses is there."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from specexec.planning.memory_room import Room
from specexec.sizes import drafter_rows, rows_held

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=70)


@st.composite
def rooms(draw: st.DrawFn) -> Room:
    """As `load` makes them: what one text of 3000 tokens with `planned` guesses takes is set aside, and some more."""
    planned = draw(st.integers(0, 4096))
    token_B, draft_B, node_B, text_B = (draw(st.integers(0, 10**6)) for _ in range(4))
    bare = Room(0, token_B, draft_B, node_B, text_B, least=min(planned, 64), most=planned)
    beside = replace(bare, token_B=draw(st.integers(1, 10**6)), draft_B=0, node_B=0, text_B=0)
    beside = replace(beside, free_B=beside.need_B(3000, planned) + draw(st.integers(0, 10**10)))
    free_B = bare.need_B(3000, planned) + draw(st.integers(0, 10**10))
    return replace(bare, free_B=free_B, beside=draw(st.sampled_from([None, beside])))


@given(rooms(), LENGTHS, st.integers(0, 5000))
def test_all_guesses_of_all_texts_that_are_let_in_have_room(room: Room, asking: list[int], most: int) -> None:
    live: list[int] = []
    for length in asking:
        if room.admits(live, length):
            live.append(length)
    nodes = room.nodes(live, most)
    assert min(room.least, most) <= nodes <= most
    for side in (room, room.beside):
        if side is not None:
            target_B = sum(rows_held(length + nodes) for length in live) * side.token_B
            drafts_B = sum(rows_held(length + drafter_rows(nodes)) for length in live) * side.draft_B
            others_B = len(live) * (side.node_B * nodes + side.text_B)
            assert target_B + drafts_B + others_B <= side.free_B
    if nodes < most:
        assert not room.holds(live, nodes + 1)


@given(rooms(), st.integers(1, 3000))
def test_a_text_alone_has_all_guesses_that_were_planned(room: Room, length: int) -> None:
    assert room.nodes([length], room.most) == room.most


@given(rooms(), LENGTHS, st.integers(0, 5000))
def test_more_texts_never_bring_more_guesses(room: Room, lengths: list[int], most: int) -> None:
    assert room.nodes(lengths, most) <= room.nodes(lengths[:-1], most)
