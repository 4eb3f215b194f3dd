"""One line of JSON becomes an object, or a refusal that says what is wrong with it."""

from __future__ import annotations

import json

from cli.batch.input.items import Json
from cli.openai.nesting import MOST_LEVELS, deeper
from cli.shared.errors import BadJsonl


class _Twice(ValueError):
    """A field that a line gives two values."""


def read_object(line: bytes, place: str) -> dict[str, Json]:
    """The object that a line holds. Raises BadJsonl."""
    try:
        record = json.loads(line.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise BadJsonl(f"{place}: not UTF-8 text.") from None
    except json.JSONDecodeError as problem:
        raise BadJsonl(f"{place}: not JSON ({problem.msg}, column {problem.colno}).") from None
    except _Twice as problem:
        raise BadJsonl(f"{place}: {problem}.", hint="leave one of them.") from None
    except RecursionError:
        raise BadJsonl(f"{place}: nested more than {MOST_LEVELS} levels deep.") from None
    except ValueError as problem:  # a number of thousands of digits
        raise BadJsonl(f"{place}: not JSON that can be read ({type(problem).__name__}).") from None
    if not isinstance(record, dict):
        kind = "null" if record is None else f"a {type(record).__name__}"
        raise BadJsonl(f"{place}: a line must be an object, this is {kind}.")
    if deeper(record):
        raise BadJsonl(f"{place}: nested more than {MOST_LEVELS} levels deep.")
    return record


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """JSON allows a name twice, and readers then drop one of the values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"field {twice!r} is there twice")
    return found
