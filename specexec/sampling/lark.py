"""Grammars as people write them down: llama.cpp's GBNF or llguidance's Lark, both as Lark. Imports no torch."""

from __future__ import annotations

from llguidance.gbnf_to_lark import any_to_lark

from specexec.errors import BadGrammar

MOST_CHARACTERS = 100_000  # what llguidance reads of it however deep its rules nest


def lark(text: str) -> str:
    """A grammar in Lark, as llguidance reads it. Raises BadGrammar for GBNF that cannot be read."""
    if len(text) > MOST_CHARACTERS:
        raise BadGrammar(f"the grammar has {len(text):,} characters; {MOST_CHARACTERS:,} are allowed.")
    try:
        return any_to_lark(text)
    except RecursionError:
        raise BadGrammar(
            "the grammar nests too deep to be read.", hint="rules with names in place of groups."
        ) from None
    except Exception as problem:  # the converter has no class for all that it raises
        raise BadGrammar(f"the grammar cannot be read as GBNF (root ::= …) or Lark (start: …): {problem}.") from None
