"""In which order llama.cpp's converter writes what it does not write as it is: the places of its rows and columns.

Each function is given what the header says and the shape of a stored tensor, and says where its items lie in the tensor
of the transformers module: in one place, or in several one after another.   H heads   E experts   K key heads, each of
which serves r value heads (gated delta rule)
"""

from collections.abc import Callable
from itertools import pairwise

from offload.checkpoint.entry import Strides
from offload.checkpoint.gguf.facts import GgufFacts

Shape = tuple[int, ...]
Order = Callable[[GgufFacts, Shape], list[Strides]]


def query_pairs(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """Rows 2i and 2i + 1 of a head are rows i and i + half of the module."""
    return _pairs(facts, shape, facts.count("attention.head_count"))


def key_pairs(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """The same of keys."""
    return _pairs(facts, shape, facts.count("attention.head_count_kv", facts.count("attention.head_count")))


def _pairs(facts: GgufFacts, shape: Shape, heads: int) -> list[Strides]:
    facts.divides(2 * heads, shape[0], "rows of queries or keys")
    return [Strides.all_of(*shape).split(0, heads, 2).swapped(1, 2)]


def turned(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """Experts [E, out, in] that the module keeps as [E, in, out]."""
    experts, outputs, inputs = facts.dimensions(shape, 3)
    return [Strides.all_of(experts, inputs, outputs).swapped(1, 2)]


def even(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """Gates, which gpt-oss keeps in turns with what they act on."""
    return _in_turns(facts, shape, 0)


def odd(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """What the gates act on."""
    return _in_turns(facts, shape, 1)


def _in_turns(facts: GgufFacts, shape: Shape, which: int) -> list[Strides]:
    if len(shape) == 2:  # biases
        return [Strides.all_of(*shape, 2).at(2, which)]
    experts, outputs, inputs = facts.dimensions(shape, 3)
    return [Strides.all_of(experts, inputs, outputs, 2).at(3, which).swapped(1, 2)]


def keys_of_latents(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """[H, rank, key] of a matrix that the module keeps as [H * (key + value), rank] with the values."""
    heads, rank, key = facts.dimensions(shape, 3)
    value = facts.count("attention.value_length_mla")
    return [Strides.all_of(heads, key + value, rank).part(1, 0, key).swapped(1, 2)]


def values_of_latents(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """[H, value, rank] of the same."""
    heads, value, rank = facts.dimensions(shape, 3)
    key = facts.count("attention.key_length_mla") - facts.count("rope.dimension_count")
    if key < 1:
        raise facts.refuse(f"leaves {key} numbers of a key unrotated (attention.key_length_mla, rope.dimension_count)")
    return [Strides.all_of(heads, key + value, rank).part(1, key, key + value)]


def mixed_rows(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """Rows of queries and keys as they are, then those of values, the key heads in turns."""
    keys, each, _ = _heads(facts)
    first = 2 * keys * facts.count("ssm.state_size")
    whole = Strides.all_of(*shape)
    facts.divides(keys * each, shape[0] - first, "rows of values")
    values = whole.part(0, first, shape[0]).split(0, keys, each).swapped(0, 1)
    return [whole.part(0, 0, first), values]


def value_rows(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """Rows, or single numbers, of value heads: the key heads in turns."""
    keys, each, _ = _heads(facts)
    facts.divides(keys * each, shape[0], "value heads")
    return [Strides.all_of(*shape).split(0, keys, each).swapped(0, 1)]


def value_columns(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """Columns of value heads: the key heads in turns."""
    keys, each, _ = _heads(facts)
    rows, columns = facts.dimensions(shape, 2)
    facts.divides(keys * each, columns, "columns of values")
    return [Strides.all_of(rows, columns).split(1, keys, each).swapped(1, 2)]


def grouped_rows(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """All queries, all keys and all values of rows that the module keeps by key head, with the gates behind them."""
    (_, each, dim), size = _heads(facts), facts.count("ssm.state_size")
    ends = (0, size, 2 * size, 2 * size + each * dim)
    whole = _grouped(facts, shape[-1])
    return [whole.part(1, start, stop) for start, stop in pairwise(ends)]


def grouped_gates(facts: GgufFacts, shape: Shape) -> list[Strides]:
    """The gates of the same rows."""
    _, each, dim = _heads(facts)
    whole = _grouped(facts, shape[-1])
    return [whole.part(1, whole.sizes[1] - each * dim, whole.sizes[1])]


def _grouped(facts: GgufFacts, columns: int) -> Strides:
    keys, each, dim = _heads(facts)
    return Strides.all_of(keys, 2 * facts.count("ssm.state_size") + 2 * each * dim, columns)


def _heads(facts: GgufFacts) -> tuple[int, int, int]:
    """How many key heads there are, value heads of each, and numbers of a value head."""
    keys, values = facts.count("ssm.group_count"), facts.count("ssm.time_step_rank")
    inner = facts.count("ssm.inner_size")
    facts.divides(keys, values, "value heads")
    facts.divides(values, inner, "values")
    return keys, values // keys, inner // values
