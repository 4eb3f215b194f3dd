"""Words that arrive in pieces, kept whole at the right edge of a terminal. Text in, text with line breaks out."""

from __future__ import annotations

from rich.cells import cell_len


class WordWrap:
    """Follows the cursor. A word that outgrows its line is taken back and begun again on the next."""

    def __init__(self) -> None:
        self.column = 0
        self._word = ""

    def feed(self, text: str, width: int) -> str:
        """`text` with breaks and, for a word begun by an earlier piece, the codes that move it down."""
        return "".join(self._place(character, max(width - 1, 1)) for character in text)

    def _place(self, character: str, width: int) -> str:
        if character == "\n":
            return self._break("")
        if character == "\t":
            return "".join(self._place(" ", width) for _ in range(8 - self.column % 8))
        cells = cell_len(character)
        fits = self.column + cells <= width
        if character == " ":
            self._word = ""
            if not fits:
                return self._break("")
            self.column += 1
            return " "
        moved = "" if fits else self._next_line(width)
        self._word += character
        self.column += cells
        return moved + character

    def _next_line(self, width: int) -> str:
        begun = cell_len(self._word)
        if begun == 0 or begun >= self.column:  # nothing to move, or a word wider than the line
            return self._break("")
        word = self._word
        return f"\x1b[{begun}D\x1b[K{self._break(word)}{word}"

    def _break(self, word: str) -> str:
        self._word = word
        self.column = cell_len(word)
        return "\n"
