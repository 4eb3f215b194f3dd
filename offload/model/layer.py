"""One decoder layer whose weights are present only while it computes. The one seam between weights and modelling code.

Knows no file, thread or token: it borrows tensors from a `Stream`, lets transformers' own layer run, gives them back.
R rows (tokens) of one sequence

nn.Module registers every module that is assigned to it: `parameters`, `state_dict` and `to` would find the inner layer,
whose parameters are empty. So a streamed layer holds it in a plain object, which nn.Module does not look into.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from offload.checkpoint.experts import experts_of, when_chosen
from offload.machine.heap import suit
from offload.machine.out_of_memory import refusal
from offload.model.model_stream import ModelStream

Argument = torch.Tensor | tuple[torch.Tensor, ...] | object
Output = torch.Tensor | tuple[torch.Tensor | None, ...]


LEAST = 16
LESS = "fewer guesses (--budget), a smaller --ctx, or a shorter prompt."


@dataclass(frozen=True)
class Place:
    """Where one tensor of the layer belongs: a module's own table of parameters or buffers."""

    table: dict[str, torch.Tensor | None]
    key: str
    name: str
    placeholder: torch.Tensor

    def keep(self, tensor: torch.Tensor) -> None:
        """Put it there for good, as a parameter where one belongs."""
        parameter = isinstance(self.placeholder, nn.Parameter)
        self.table[self.key] = nn.Parameter(tensor, requires_grad=False) if parameter else tensor


@dataclass(frozen=True)
class _Unregistered:
    """Transformers' layer, and its fused experts if it has any."""

    layer: nn.Module
    experts: nn.Module | None


class StreamedLayer(nn.Module):
    """Takes the place of transformers' layer in the model's list and computes exactly what it would compute."""

    index: int
    source: ModelStream
    """The stream that its tensors are borrowed from, the same for all layers of a model."""

    chunk_rows: int | None
    """Run the layer over so many rows at a time (one visit of the weights, bounded activations)."""
    tokens: Sequence[int]
    """Of the rows that differ, whatever repeats them to fill a tile; none if all may."""
    together: Sequence[range]
    """Rows that attend to one another: in one piece, whatever `chunk_rows` says."""

    _routed: int
    """Rows of this visit that were sent to experts already."""
    _held: _Unregistered
    _places: list[Place]

    def __init__(self, layer: nn.Module, index: int, source: ModelStream) -> None:
        super().__init__()
        found = experts_of(layer)
        self._held = _Unregistered(layer, found and found[1])
        self.index, self.source = index, source
        self.chunk_rows = None
        self.tokens = self.together = ()
        self._routed = 0
        self._places = places(layer)

    @property
    def inner(self) -> nn.Module:
        """Transformers' layer; its weights are there only while it computes."""
        return self._held.layer

    def __getattr__(self, name: str) -> object:  # type: ignore[override]  # nn.Module promises less than we forward
        if name == "_held":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._held.layer, name)

    def forward(self, *args: Argument, **kwargs: Argument) -> Output:
        """The layer's own forward, with its weights in place for just this long."""
        stream = self.source.stream
        try:
            hidden = args[0] if args else kwargs["hidden_states"]
            assert isinstance(hidden, torch.Tensor)
            rows = hidden.shape[:-1].numel()
            if self.index == 0 and hidden.device.type == "cpu":
                suit(rows)
            if self.index == 0 and self.tokens:
                stream.expect(self.source.likely.of(self.tokens))
            self._routed = 0
            tensors = stream.take(self.index, len(self.tokens) or rows)
            for place in self._places:
                place.table[place.key] = tensors[place.name]
            with when_chosen(self._held.experts, self._fetch):
                return self._run(args, kwargs)
        except (MemoryError, RuntimeError) as error:
            # The sweep ends, the model stays usable.
            if scarce := refusal(error, f"while layer {self.index} computed", LESS):
                raise scarce from error
            raise
        finally:
            # Back to the placeholder: a call of the layer without its weights is an error, not old numbers.
            for place in self._places:
                place.table[place.key] = place.placeholder
            stream.give()

    def _fetch(self, experts: Collection[int], chosen_RK: NDArray[np.int64] | None) -> None:
        """These experts are about to compute."""
        stream = self.source.stream
        stream.fetch(experts)
        if self.tokens and chosen_RK is not None and not stream.stays(self.index):
            here = self.tokens[self._routed : self._routed + len(chosen_RK)]
            self.source.likely.learn(self.index, here, chosen_RK, stream.routing)
            self._routed += len(chosen_RK)

    def _run(self, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> Output:
        inner = self.inner
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        rows = hidden.shape[1] if hidden.dim() >= 3 else 0
        whole = self.chunk_rows is None or rows <= self.chunk_rows or hidden.shape[0] != 1
        if whole or kwargs.get("attention_mask") is not None:
            output: Output = inner(*args, **kwargs)
            return output
        assert self.chunk_rows is not None
        joined: Output | None = None
        for rows_here in pieces(rows, self.chunk_rows, self.together):
            chunk = inner(
                *(_slice(value, rows, rows_here) for value in args),
                **{name: _slice(value, rows, rows_here) for name, value in kwargs.items()},
            )
            joined = _placed(joined, chunk, rows_here, rows)
        assert joined is not None
        return joined


def pieces(rows: int, most: int, together: Sequence[range]) -> Iterator[slice]:
    """All rows in their order, `most` at a time, and more where a piece would end inside one of `together`.

    A remainder of less than `LEAST` rows belongs to the piece before it: kernels sum few rows in another order.
    """
    start = 0
    while start < rows:
        stop = min(start + most, rows)
        stop = max([stop, *(run.stop for run in together if run.start < stop < run.stop)])
        stop = rows if together and rows - stop < LEAST else stop
        yield slice(start, stop)
        start = stop


def streamed_layers(model: nn.Module) -> list[StreamedLayer]:
    """The streamed layers of a model, in their order; none of one that was not loaded to stream."""
    return [module for module in model.modules() if isinstance(module, StreamedLayer)]


def places(layer: nn.Module) -> list[Place]:
    """Every parameter and every buffer that is part of the checkpoint."""
    found: list[Place] = []
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        for key, tensor in module._parameters.items():
            if tensor is not None:
                found.append(Place(module._parameters, key, prefix + key, tensor))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                found.append(Place(module._buffers, key, prefix + key, buffer.to("meta")))
    return found


def _slice(value: Argument, rows: int, wanted: slice) -> Argument:
    """The wanted rows of whatever has one entry per row; anything else as it is."""
    if isinstance(value, torch.Tensor):
        if value.dim() < 2 or value.shape[1] != rows:
            return value
        # torch 2.13 multiplies rows 20 times slower if the stride of their one batch is not that of the rows there are.
        return value[0, wanted].unsqueeze(0) if len(value) == 1 else value[:, wanted]
    if isinstance(value, tuple) and any(isinstance(item, torch.Tensor) for item in value):
        return tuple(_slice(item, rows, wanted) for item in value)
    if isinstance(value, dict):
        return {name: _slice(item, rows, wanted) for name, item in value.items()}
    return value


def _placed(whole: Any, chunk: Any, here: slice, rows: int) -> Any:
    """The output of all rows with a chunk of them in its place; made for the first. Copies beside it would leave holes
    in memory that nothing else fits into.
    """
    if isinstance(chunk, tuple):
        columns = whole if isinstance(whole, tuple) else (None,) * len(chunk)
        return tuple(_placed(column, part, here, rows) for column, part in zip(columns, chunk, strict=True))
    if chunk is None or chunk.dim() < 2 or chunk.shape[1] != here.stop - here.start:
        return chunk  # not rows of the sequence (attention maps, router logits): no meaning across chunks
    if not isinstance(whole, torch.Tensor):
        whole = chunk.new_empty(chunk.shape[0], rows, *chunk.shape[2:])
    whole[:, here] = chunk
    return whole
