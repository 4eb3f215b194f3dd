"""How model families write thoughts and tool calls, and how an answer is read back. Knows no weights and no server."""

from specexec.pieces import Call, Piece
from specexec.text.formats.find import format_of
from specexec.text.formats.format import Format
from specexec.text.formats.reader import Reader

__all__ = ["Call", "Format", "Piece", "Reader", "format_of"]
