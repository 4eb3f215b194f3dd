"""An answer's Markdown on a terminal: the same lines however it arrives, nothing left out, nothing printed changes."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from rich.cells import cell_len

from cli.terminal.markdown import MarkdownProse

ANSWER = """\
# A title with *stress*

Some **bold** words and `code`, a [link](http://a.example/b), <b>tags</b> and ![a picture](p.png).
A line that stays a line & is so long that it has to be broken somewhere in the middle of it.

- one
- two
  - inner
- three

9. nine
10. ten

    more of ten
```python
def f(x):
    '''Two
    lines.'''
    return x  # why

class A: pass
```
| a | b |
|---|---|
| 1 | 日本 |

> quoted
> twice

set with a line
---------------
[name]: http://defined.example

1. A step
   ```sh
   ls
   ```
```
never closed
"""


def told(answer: str, pieces: list[int], *, width: int = 60, colour: bool = False) -> list[str]:
    """The finished lines of an answer that came in pieces of these sizes."""
    prose, lines, at = MarkdownProse(colour=colour), list[str](), 0
    for size in pieces:
        lines += prose.feed(answer[at : at + size], width)
        prose.tail(width)
        at += size
    return lines + prose.feed(answer[at:], width) + prose.end(width)


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_size_come_out_like_the_whole(seed: int) -> None:
    sizes = random.Random(seed).choices([1, 2, 5, 20, 60], k=200)
    assert told(ANSWER, sizes) == told(ANSWER, [])


def test_nothing_that_was_written_is_left_out() -> None:
    text = " ".join(told(ANSWER, []))
    for word in set(re.findall(r"[\w日本]+", ANSWER)) - {"sh"}:  # the language of code inside a list
        assert word in text, word
    for odd in ("<b>tags</b>", "http://a.example/b", "p.png", "[name]: http://defined.example", "```python"):
        assert odd in text


def test_finished_lines_are_exactly_these() -> None:
    assert told("# Hi\nA *b* c\nd\n\n- x\n- y\n\n```py\nx = 1\n```\nend", []) == [
        "Hi", "", "A b c", "d", "", " • x", " • y", "", "```py", "x = 1", "```", "", "end",
    ]  # fmt: skip


def test_a_block_is_finished_when_the_next_begins_and_code_line_by_line() -> None:
    prose = MarkdownProse(colour=False)
    assert prose.feed("A para", 60) == []
    assert prose.tail(60) == ["A para"]
    assert prose.feed("graph\nof two lines\n\n", 60) == []
    assert prose.feed("```\nfirst\nsec", 60) == ["A paragraph", "of two lines", "", "```", "first"]
    assert prose.tail(60) == ["sec"]
    assert prose.feed("ond\n```\n", 60) == ["second", "```"]
    assert prose.tail(60) == []
    assert prose.feed("- x\n", 60) == []
    assert prose.end(60) == ["", " • x"]


@pytest.mark.parametrize("width", [12, 40, 200])
def test_lines_fit_the_terminal_and_carry_no_spaces_at_their_end(width: int) -> None:
    for line in told(ANSWER, [7] * 200, width=width):
        assert cell_len(line) <= width
        assert line == line.rstrip()


def test_a_resize_in_the_middle_of_code_loses_no_line() -> None:
    prose, lines = MarkdownProse(colour=False), list[str]()
    for number, width in enumerate([60, 20, 80] * 5):
        lines += prose.feed("```\n" if not number else f"line {number} with some more words\n", width)
    text = " ".join(" ".join(lines + prose.end(40)).split())
    assert re.findall(r"\d+", text) == [str(number) for number in range(1, 15)]


def test_colours_change_no_letter_and_no_colour_means_no_codes() -> None:
    coloured = told(ANSWER, [5] * 300, colour=True)
    assert any("\x1b[" in line for line in coloured)
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured] == told(ANSWER, [5] * 300)
    assert not any("\x1b" in line for line in told(ANSWER, []))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_other_separators_than_line_ends_lose_and_double_nothing(separator: str) -> None:
    answer = f"a{separator}b\n\n```\nc{separator}d\n```\n\n- e{separator}f\n\nlast\n"
    for sizes in ([], [1] * 60):
        letters = [letter for line in told(answer, sizes) for letter in line if letter.isalpha()]
        assert "".join(letters) == "abcdeflast"


TABLE = """\
| name | what it says | where |
|---|---|---|
| pneumonoultramicroscopicsilicovolcanoconiosis | a long cell that must be folded somewhere and not cut | https://example.org/a/very/long/path/that/does/not/fit?query=everything&more=1 |
| 日本語の長い長い長いセルの中身はここに全部書いてあります | 中文内容也必须完整显示在终端上不能被截断 | ftp://x.example/資料/一覧 |
"""  # noqa: E501 - a table row is one line


@pytest.mark.parametrize("width", [24, 40, 79, 200])
@pytest.mark.parametrize("colour", [False, True])
def test_every_character_of_a_table_is_shown_at_any_width(width: int, colour: bool) -> None:
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in told(TABLE, [9] * 50, width=width, colour=colour)]
    assert "…" not in "".join(lines)
    shown = Counter("".join(lines))
    for letter, count in Counter(re.sub(r"[\s|-]", "", TABLE)).items():
        assert shown[letter] >= count, letter


@pytest.mark.parametrize(
    "written",
    [
        r"\( a * b * c \) and $$x *y* z$$",
        r"\[ E = mc^2 \]",
        r"so \(a_1 + b_1\) and \{x\} hold",
        r"$\frac{a}{b}\\c$",
        r"C:\\temp \# \* \_",
        r"50\% of \$5",
        "&amp; and &lt;b&gt;",
    ],
)
def test_backslashes_and_entities_are_shown_as_written(written: str) -> None:
    assert " ".join(told(written, [3] * 20)) == written
