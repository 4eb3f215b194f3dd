"""An answer's Markdown as lines of a terminal. A block is finished when the next one has begun; then it never changes.

Parsing is markdown-it's and drawing is Rich's; here is only what may leave the screen and when. Nothing that was
written is left out: HTML, images and link definitions appear as text, line ends stay line ends, backslashes and LaTeX
as they were written.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments.token import Comment, Keyword, Number, String
from pygments.token import Token as AnyToken
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement, TableElement
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from cli.shared.wrap import wrapped

# Readable on dark and on light terminals: their own sixteen colours, and no background.
_THEME = Theme(
    {
        **dict.fromkeys(("markdown.item.bullet", "markdown.item.number", "markdown.link"), "none"),
        **dict.fromkeys(("markdown.h1", "markdown.h2", "markdown.table.header"), "bold"),
        **dict.fromkeys(("markdown.block_quote", "markdown.table.border", "markdown.hr"), "dim"),
        "markdown.code": "cyan",
        "markdown.link_url": "dim underline",
    }
)
_CODE_THEME = ANSISyntaxTheme(
    {
        (AnyToken,): Style.null(),
        (*Keyword,): Style(bold=True),
        (*String,): Style(color="green"),
        (*Number,): Style(color="cyan"),
        (*Comment,): Style(dim=True),
    }
)


_FORMULA = re.compile(r"\\\(.+?\\\)|\\\[.+?\\\]|\$\$.+?\$\$", re.DOTALL)


@dataclass(frozen=True)
class MarkdownBlock:
    """Lines [begin, end) of the source: a block of the top level, or one item of a list there."""

    kind: str
    begin: int
    end: int
    info: str = ""

    def follows_closely(self, other: MarkdownBlock) -> bool:
        """Whether no empty line belongs between `other` and this."""
        return self.kind == other.kind == "list_item_open"


class MarkdownProse:
    """One answer. Its unfinished block is the tail; a block of code is finished line by line."""

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour
        self._source = ""  # from the beginning of the first unfinished block
        self._code_lines = 0  # of that block, if it is code: how many are finished
        self._last: MarkdownBlock | None = None  # the one before it

    def feed(self, text: str, width: int) -> list[str]:
        self._source += text
        lines, source = list[str](), self._source
        # An unfinished line may still turn out to be anything; it decides nothing.
        blocks = _blocks(source[: source.rfind("\n") + 1])
        if not blocks:
            return []
        ended = blocks[-1].kind == "fence" and _closed(blocks[-1], source)
        finished = blocks if ended else blocks[:-1]
        for block in finished:
            lines += self._finish(block, source, width)
        if finished:
            begin = blocks[-1].end if ended else blocks[-1].begin
            self._source = "\n".join(_lines(source)[begin:])
        if blocks[-1].kind == "fence" and not ended:
            lines += self._code_so_far(width)
        return lines

    def tail(self, width: int) -> list[str]:
        tail, before = list[str](), self._last
        for block in _blocks(self._source):
            tail += self._gap(block, before) + self._drawn(block, self._source, width)
            before = block
        return tail

    def end(self, width: int) -> list[str]:
        lines = []
        for block in _blocks(self._source):
            lines += self._finish(block, self._source, width)
        self._source, self._last = "", None
        return lines

    def _finish(self, block: MarkdownBlock, source: str, width: int) -> list[str]:
        lines = self._gap(block, self._last) + self._drawn(block, source, width)
        self._last, self._code_lines = block, 0
        return lines

    def _gap(self, block: MarkdownBlock, before: MarkdownBlock | None) -> list[str]:
        begun = block.kind == "fence" and self._code_lines
        return [] if before is None or begun or block.follows_closely(before) else [""]

    def _code_so_far(self, width: int) -> list[str]:
        """Whole lines of a block of code that is still open."""
        whole = self._source[: self._source.rfind("\n") + 1]
        (block,) = _blocks(whole)
        lines = self._gap(block, self._last) + self._drawn(block, whole, width)
        self._code_lines = block.end - block.begin
        return lines

    def _drawn(self, block: MarkdownBlock, source: str, width: int) -> list[str]:
        written = _lines(source)[block.begin : block.end]
        if block.kind == "fence":
            return self._render(_Code(written, block.info, self._code_lines, closed=_closed(block, source)), width)
        lines = self._render(_Faithful("\n".join(written)), width)
        if block.kind == "table_open" and not _letters("\n".join(written)) <= _letters("\n".join(lines)):
            # Cells without a heading, or more columns than the terminal has room for.
            return [line for text in written for line in wrapped(text, width)]
        return lines

    def _render(self, what: RenderableType, width: int) -> list[str]:
        console = Console(
            file=io.StringIO(), force_terminal=True, width=width, theme=_THEME, highlight=False, legacy_windows=False,
            color_system="standard" if self._colour else None,
        )  # fmt: skip
        lines = [_line(console, segments) for segments in console.render_lines(what, pad=False)]
        return lines if isinstance(what, _Code) else _without_margins(lines)


class _Code:
    """Some lines of a block of code, with its fences, so that it can be seen without colours and copied as it is."""

    def __init__(self, written: list[str], info: str, first: int, *, closed: bool) -> None:
        self._written, self._info, self._first, self._closed = written, info, first, closed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        opening, *code = self._written
        closing = [code.pop()] if self._closed else []
        if not self._first:
            yield Text(opening, style="dim")
        if len(code) > max(self._first - 1, 0):
            yield _highlighted("\n".join(code), self._info, (max(self._first, 1), len(code)))
        for fence in closing:
            yield Text(fence, style="dim")


class _PlainHeading(Heading):
    """Headings begin at the left like everything else."""

    LEVEL_ALIGN: ClassVar = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _WholeTable(TableElement):
    """A table whose long cells are folded, not cut."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _InnerCode(CodeBlock):
    """Code inside a list or a quote."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _highlighted(str(self.text).rstrip("\n"), self.lexer_name, None)


class _Faithful(Markdown):
    """Rich's Markdown without losses."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements, "heading_open": _PlainHeading, "table_open": _WholeTable, "fence": _InnerCode,
        "code_block": _InnerCode,
    }  # fmt: skip

    def __init__(self, source: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _parse(source)
        for token in _inner(self.parsed):
            if token.type == "softbreak":
                token.type = "hardbreak"
            elif token.type == "text_special":  # an escape or an entity: LaTeX looks the same
                token.type, token.content = "text", token.markup


def _lines(source: str) -> list[str]:
    """Lines as the parser counts them: other separators of Unicode are characters like any."""
    return source.split("\n")


def _blocks(source: str) -> list[MarkdownBlock]:
    blocks = []
    for token in _parse(source):
        item = token.level == 1 and token.type == "list_item_open"
        if token.map and (item or (token.level == 0 and token.nesting >= 0 and not token.type.endswith("list_open"))):
            blocks.append(MarkdownBlock(token.type, token.map[0], token.map[1], token.info))
    return blocks


def _parse(source: str) -> list[Token]:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    parser.disable(["reference", "image", "html_block", "html_inline", "text_join"])
    parser.inline.ruler.before("escape", "formula", _formula)
    return parser.parse(source)


def _formula(state: StateInline, silent: bool) -> bool:
    """A rule of the parser: what is between LaTeX's brackets is no Markdown."""
    found = _FORMULA.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("text", "", 0).content = found[0]
    state.pos = found.end()
    return True


def _letters(text: str) -> Counter[str]:
    return Counter(character for character in text if character.isalnum())


def _inner(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _inner(token.children or [])


def _closed(block: MarkdownBlock, source: str) -> bool:
    """Whether a fence has its other end."""
    lines = _lines(source)[block.begin : block.end]
    mark = lines[0].lstrip()[:3]
    return len(lines) > 1 and lines[-1].strip().startswith(mark) and not lines[-1].strip(f" {mark[0]}")


def _highlighted(code: str, language: str, lines: tuple[int, int] | None) -> Syntax:
    return Syntax(
        code, language.partition(" ")[0] or "text", theme=_CODE_THEME, word_wrap=True, line_range=lines
    )  # fmt: skip


def _without_margins(lines: list[str]) -> list[str]:
    """Lines without the empty ones before and after them."""
    filled = [number for number, line in enumerate(lines) if line]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def _line(console: Console, segments: list[Segment]) -> str:
    """Segments as text with its codes, without the spaces that fill a line."""
    while segments and not segments[-1].text.strip():
        segments.pop()
    if segments:
        last = segments[-1]
        segments[-1] = Segment(last.text.rstrip(), last.style)
    return "".join(
        segment.style.render(segment.text, color_system=console._color_system) if segment.style else segment.text
        for segment in segments
    )
