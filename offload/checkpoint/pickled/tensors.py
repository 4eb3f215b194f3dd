"""The tensors that a file of torch.save describes, as byte ranges: a pickle that asks for more than tensors is refused.

Of what a pickle may name, a few words of torch's are known here, and none of them does anything but describe.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeGuard, cast

from offload.checkpoint.entry import Entry
from offload.checkpoint.pickled.archive import TorchArchive, open_archive
from offload.errors import CorruptShard, UnsupportedModel

STORAGES = {  # of numbers of this type, and their bytes
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2), "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "BoolStorage": ("BOOL", 1),
}  # fmt: skip

# Of sets and dictionaries that torch.save does not write so.
UNUSED = {code[0] for code in (pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)}
MOST_DIMENSIONS = 64  # that torch itself has


class _Numbers(NamedTuple):
    """A record, as numbers of a type."""

    dtype: str
    item_B: int
    record: str
    items: int


class _View(NamedTuple):
    """A tensor over them."""

    numbers: _Numbers
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickled(file: Path) -> dict[str, Entry]:
    """The tensors of a state dict by their names.

    Raises UnsupportedModel for a pickle that asks for more, or holds something else; CorruptShard for damage.
    """
    archive = open_archive(file)
    try:
        found = _Description(archive).load()
    except _MoreThanTensors as error:
        raise UnsupportedModel(
            f"{file.name} is a pickle that asks for {error}, which is more than tensors.",
            "What a pickle asks for is run when it is loaded.",
            hint="a file that holds weights alone: safetensors, or torch.save of a state dict.",
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptShard(f"{file.name} is damaged: {error}.", hint="download it again.") from error
    if not isinstance(found, dict) or not all(
        type(name) is str and isinstance(one, _View) for name, one in found.items()
    ):
        raise UnsupportedModel(
            f"{file.name} holds something else than tensors by name.", hint="torch.save of the head's state_dict()."
        )
    return {name: _entry(file, name, view, archive) for name, view in found.items()}


class _MoreThanTensors(Exception):
    pass


class _Description(pickle._Unpickler):  # the one in Python: a file cannot make it take memory that it does not fill
    def __init__(self, archive: TorchArchive) -> None:
        super().__init__(io.BytesIO(archive.description))

    def find_class(self, module: str, name: str) -> object:
        known: dict[tuple[str, str], object] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _view,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in known:
            raise _MoreThanTensors(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: object) -> _Numbers:
        match pid:
            case ("storage", (str(dtype), int(item_B)), str(key), _, int(count)):
                return _Numbers(dtype, item_B, f"data/{key}", count)
        raise _MoreThanTensors(reprlib.repr(pid))  # which is short, whatever that holds

    def load_build(self) -> None:
        """What an object's attributes are is left out: tensors need none, and a state dict's are not its tensors."""
        self.stack.pop()  # type: ignore[attr-defined]  # not known to typeshed

    def load_setitem(self) -> None:
        """Only under a name that is text: others may nest so deeply that to find their place takes for ever."""
        if type(self.stack[-2]) is not str:  # type: ignore[attr-defined]  # see above
            raise _MoreThanTensors("names that are no text")
        super().load_setitem()  # type: ignore[misc]  # see above

    def load_setitems(self) -> None:
        """The same of many."""
        if any(type(name) is not str for name in self.stack[::2]):  # type: ignore[attr-defined]  # see above
            raise _MoreThanTensors("names that are no text")
        super().load_setitems()  # type: ignore[misc]  # see above

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in UNUSED
    } | {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def _view(numbers: object, first: object, shape: object, strides: object, *_: object) -> _View:
    if not isinstance(numbers, _Numbers) or not _naturals((first,)) or not _naturals(shape) or not _naturals(strides):
        raise ValueError("a tensor lies nowhere")
    return _View(numbers, cast("int", first), shape, strides)


def _naturals(found: object) -> TypeGuard[tuple[int, ...]]:
    if not isinstance(found, tuple) or len(found) > MOST_DIMENSIONS:
        return False
    return all(type(one) is int and 0 <= one < 1 << 63 for one in found)


def _parameter(view: _View, *_: object) -> _View:
    return view


def _entry(file: Path, name: str, view: _View, archive: TorchArchive) -> Entry:
    """Checked against the file."""
    numbers, record = view.numbers, archive.records.get(view.numbers.record, range(0))
    count = math.prod(view.shape)
    if view.first + count > numbers.items or numbers.items * numbers.item_B != len(record):
        raise CorruptShard(
            f"{file.name} is damaged: '{name}' of the shape {list(view.shape)} is not in its {len(record)} bytes.",
            hint="download it again.",
        )
    if not _row_major(view.shape, view.strides):
        raise UnsupportedModel(
            f"{file.name} holds '{name}' in another order than row by row.", hint="save it anew after .contiguous()."
        )
    offset = record.start + view.first * numbers.item_B
    return Entry(name, file, offset, count * numbers.item_B, numbers.dtype, view.shape)


def _row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    if len(shape) != len(strides):
        return False
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
