"""What a GGUF header says, asked by name and checked: numbers that are numbers, sizes that the tensors have too."""

import os
import struct
from collections.abc import Mapping
from functools import cached_property

from offload.checkpoint.gguf.header import GgufHeader, GgufTensor
from offload.errors import CorruptShard, UnsupportedModel

MOST_NUMBER = 1 << 31
MOST_FACTORS = 1 << 12


class GgufFacts:
    """Metadata of one architecture, by the part of its key behind `architecture.`; tensors by name."""

    def __init__(self, header: GgufHeader, tensors: Mapping[str, GgufTensor]) -> None:
        self._header, self.tensors = header, tensors
        self.architecture = self.text("general.architecture")

    @property
    def file_name(self) -> str:
        """The file's name, for refusals."""
        return self._header.file.name

    def text(self, key: str, default: str | None = None) -> str:
        """A text by its whole key."""
        found = self._header.metadata.get(key, default)
        if not isinstance(found, str):
            raise self._missing(key, "a text", found)
        return found

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, above zero unless `least` says otherwise."""
        return self._whole(f"{self.architecture}.{key}", default, least)

    def token(self, name: str) -> int | None:
        """The id of a token that the file names for a purpose, such as `eos`."""
        key = f"tokenizer.ggml.{name}_token_id"
        return self._whole(key, None, 0) if key in self._header.metadata else None

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        full = f"{self.architecture}.{key}"
        found = self._header.metadata.get(full, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < 1e30:
            raise self._missing(full, "a number", found)
        return float(found)

    def name(self, key: str, default: str) -> str:
        """A text of the architecture."""
        return self.text(f"{self.architecture}.{key}", default)

    def has(self, key: str) -> bool:
        """Whether the architecture has a field of this name."""
        return f"{self.architecture}.{key}" in self._header.metadata

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there."""
        if tensor not in self.tensors:
            raise CorruptShard(
                f"{self.file_name} lacks the tensor '{tensor}'.", hint="download all files of the model again."
            )
        return self.tensors[tensor].shape

    def each(self, key: str, default: int | None = None) -> list[int]:
        """A whole number for every layer, where the field may hold one for all of them."""
        full = f"{self.architecture}.{key}"
        found = self._header.metadata.get(full)
        if not isinstance(found, list):
            return [self.count(key, default, least=0)] * self.layers
        numbers = [int(one) for one in found if isinstance(one, int) and 0 <= one < MOST_NUMBER]
        if len(numbers) != len(found) or len(numbers) < self.layers:
            raise self._missing(full, f"{self.layers} whole numbers", found)
        return numbers[: self.layers]

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        full = f"{self.architecture}.{key}"
        found = self._header.metadata.get(full)
        if not isinstance(found, list) or any(type(one) is not int or not 0 <= one < MOST_NUMBER for one in found):
            raise self._missing(full, "whole numbers", found)
        return [int(one) for one in found]

    def flag(self, key: str) -> bool:
        """A yes or no; no where the field is not there."""
        return self._header.metadata.get(f"{self.architecture}.{key}") is True

    def dimensions(self, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The shape, where it has so many dimensions."""
        if len(shape) != count:
            raise CorruptShard(
                f"{self.file_name} is damaged: a tensor of {list(shape)} should have {count} dimensions."
            )
        return shape

    def divides(self, parts: int, whole: int, what: str) -> None:
        """Refuse a header by which `whole` cannot be cut into so many equal parts."""
        if whole <= 0 or whole % parts:
            raise CorruptShard(
                f"{self.file_name} is damaged: by its {self.architecture} fields {whole} {what} come in {parts} parts.",
                hint="download the file again.",
            )

    @cached_property
    def layers(self) -> int:
        """How many layers there are, without those that guess further: the field and the tensors must say the same."""
        claimed = self.count("block_count")
        ahead = self.count("nextn_predict_layers", 0, least=0)
        there = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        # Files may say how many layers guess further and leave them out.
        sound = len(there) in (claimed, claimed - ahead) and there == {str(index) for index in range(len(there))}
        if ahead >= claimed or not sound:
            raise CorruptShard(
                f"{self.file_name}: {self.architecture}.block_count is {claimed}, and there are tensors of "
                f"{len(there)} blocks.",
                "A file of the set is missing, or the header was edited.",
                "download all files of the model again.",
            )
        return claimed - ahead

    def factors(self, tensor: str) -> list[float] | None:
        """The numbers of a small F32 tensor that is part of a description; None where it is not there."""
        found = self.tensors.get(tensor)
        if found is None:
            return None
        if found.kind.name != "F32" or len(found.shape) != 1 or found.shape[0] > MOST_FACTORS:
            raise CorruptShard(f"{self.file_name}: '{tensor}' is {found.kind.name} {list(found.shape)}.")
        fd = os.open(self._header.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return list(struct.unpack(f"<{found.shape[0]}f", os.pread(fd, found.nbytes, found.offset)))
        finally:
            os.close(fd)

    def refuse(self, what: str, hint: str | None = None) -> UnsupportedModel:
        """A refusal that names file and architecture."""
        hint = hint or "the model's own safetensors folder (often the same name without -GGUF)."
        return UnsupportedModel(f"{self.file_name} ({self.architecture}) {what}.", None, hint)

    def _whole(self, key: str, default: int | None, least: int) -> int:
        found = self._header.metadata.get(key, default)
        if type(found) is not int or not least <= found < MOST_NUMBER:
            raise self._missing(key, f"a whole number from {least} up", found)
        return found

    def _missing(self, key: str, wanted: str, found: object) -> CorruptShard:
        said = "is missing" if found is None else f"is {str(found)[:60]!r}, not {wanted}"
        return CorruptShard(f"{self.file_name} is damaged: {key} {said}.", hint="download the file again.")
