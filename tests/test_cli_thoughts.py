"""Thoughts before an answer are told apart from it, however the text is cut into pieces."""

from __future__ import annotations

import pytest

from cli.thoughts import Thoughts, answer_in


def told(text: str, size: int, cue: str = "", so_far: str = "") -> tuple[str, str]:
    """Thoughts and answer."""
    thoughts = Thoughts(cue, so_far)
    runs = [run for at in range(0, len(text), size) for run in thoughts.feed(text[at : at + size])]
    runs += thoughts.end()
    return "".join(run.text for run in runs if run.thought), "".join(run.text for run in runs if not run.thought)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("text", "cue", "thought", "answer"),
    [
        ("<think>\nhm, 1 < 2</think>\n\nYes.", "", "hm, 1 < 2", "\n\nYes."),
        ("hm</think>Yes.", "<|assistant|><think>\n", "hm", "Yes."),
        ("Yes: <think> is a tag.</think>", "<|assistant|>", "", "Yes: <think> is a tag.</think>"),
        ("  <thinner>", "", "", "  <thinner>"),
        ("<think>never ended </thi", "", "never ended </thi", ""),
        ("<thi", "", "", "<thi"),
    ],
)
def test_thoughts_and_answer_are_told_apart(text: str, size: int, cue: str, thought: str, answer: str) -> None:
    assert told(text, size, cue) == (thought, answer)


def test_an_answer_that_is_gone_on_with_knows_where_it_was() -> None:
    assert told("more</think>Yes", 3, so_far="<think>hm ") == ("more", "Yes")
    assert told("<think>", 3, so_far="<think>hm</think>Well ") == ("", "<think>")


def test_an_answer_without_its_thoughts() -> None:
    assert answer_in("<think>hm</think>\n\nYes.") == "Yes."
    assert answer_in("Yes.") == "Yes."
