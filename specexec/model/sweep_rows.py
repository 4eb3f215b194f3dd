"""The rows of one sweep: which belong to which text, and what each attends to. Goes through the model as a keyword.

R packed rows   H heads   Q new rows   K rows of keys   D width of a head
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specexec.errors import SweepCancelled, UnsupportedArchitecture
from specexec.model.architecture import LayerKind
from specexec.model.attention import LayerRows, Style, Visibility, warmer
from specexec.model.cache import KVCache, LayerKV
from specexec.model.cache_in_ram import Passenger, Travel, Trip
from specexec.model.compressed import attend_compressed, taken_apart
from specexec.model.image_rows import Images, is_row, runs
from specexec.model.indexed import Chosen, attend_chosen, choose, with_index_key, without_index_key
from specexec.model.joint_attention import JointAttention, TextRows, joined
from specexec.model.kept_rows import WHOLE, KeptRows
from specexec.model.recurrent.packed import PackedStates, Text, branches_of, marks
from specexec.model.recurrent.travel import StatePassenger, StateTrip
from specexec.tree.tree import depths, intervals

if TYPE_CHECKING:
    from specexec.model.tree_lm import Rows


@dataclass(frozen=True)
class _Span:
    """The rows of one sequence within the packed axis."""

    cache: KVCache
    start: int
    stop: int
    first_node: int  # of the cache, for row `start`
    sees: Visibility
    pictured: bool = False  # whether there is an image in the text or among the rows

    @property
    def read_R(self) -> Tensor:
        """Which of its rows are read as a prompt."""
        position_R, prompt = self.sees.position_R[self.first_node :], self.cache.prompt
        return torch.ones_like(position_R, dtype=torch.bool) if prompt is None else position_R < prompt

    @property
    def states(self) -> Text:
        """The same for recurrent layers."""
        cache = self.cache
        parents_N, device = np.array(cache.parents, np.int64), self.sees.enter_R.device
        tree = branches_of(parents_N, cache.settled, marks(len(cache), cache.settled, cache.forks), device)
        return Text(self.start, self.stop, self.first_node, tree, cache.memories)


class SweepRows:
    """The layout of one forward: which rows belong to which text. Goes through the model to the attention function."""

    def __init__(
        self,
        parts: list[Rows],
        kinds: dict[int, LayerKind],
        device: torch.device,
        cancelled: threading.Event,
        travel: Travel | None,
        images: Images | None = None,
        rough: bool = False,
        kept: KeptRows = WHOLE,
    ):
        self._kinds, self._rough, self._kept = kinds, rough, kept
        self._cancelled = cancelled
        self._attended: dict[int, int] = {}
        self._joint: dict[tuple[int, int, LayerKind], list[JointAttention]] = {}
        self._chosen: dict[tuple[int, int], Chosen] = {}  # of the last layer with an index, by text and first row
        self._spans: list[_Span] = []
        start = 0
        for part in parts:
            self._spans.append(_span(part, start, device, seeing=images is not None))
            start += len(part.tokens)
        self.count = start
        self.tokens = tokens = [token for part in parts for token in part.tokens]
        self.tokens_R = torch.tensor(tokens, dtype=torch.long, device=device)
        recurrent = [layer for layer, kind in kinds.items() if kind.recurrent]
        spans = self._spans if recurrent else []
        read_R = torch.cat([span.read_R for span in spans]) if spans else self.tokens_R.new_empty(0, dtype=torch.bool)
        texts = [span.states for span in spans]
        riding = [StatePassenger(text.memories, max(text.first_node - text.tree.settled, 0)) for text in texts]
        away = None if travel is None else StateTrip(travel, recurrent, riding, device)
        self.states = PackedStates(texts, read_R, cancelled, away)
        self.positions_R = torch.cat([span.sees.position_R[span.first_node :] for span in self._spans])
        self.images = [] if images is None else runs(tokens)
        grid = images is not None and images.sight.axes and any(span.pictured for span in self._spans)
        self.grid_AR = torch.cat([_on_grid(span, images) for span in self._spans], dim=1) if grid and images else None
        attending = {layer: kind for layer, kind in kinds.items() if kind.attends}
        passengers = [_passenger(span) for span in self._spans]
        self._trip = None if travel is None else Trip(travel, attending, passengers, device)

    def attend(self, rows: LayerRows) -> Tensor:
        """Attention of the next rows of a layer, [Q, H, D]; rows beyond the last sequence repeat its last one."""
        if self._cancelled.is_set():
            raise SweepCancelled
        layer, asked, index_QF = rows.layer, rows.asked, rows.index_QF
        query_HQD, key_HKD, value_HKD = rows.query_HQD, rows.key_HKD, rows.value_HKD
        kind = self._kinds[layer]
        window = kind.compressed.window if kind.compressed else kind.window
        if asked.window not in (None, window):
            raise UnsupportedArchitecture(
                f"layer {layer} attends through a window of {asked.window}, its config says {window}."
            )
        if kind.compressed:
            key_HKD, value_HKD, index_QF = taken_apart(key_HKD, query_HQD.shape[1], kind.compressed)
        begin = self._attended.get(layer, 0)
        end = begin + query_HQD.shape[1]
        if begin >= self.count:
            raise UnsupportedArchitecture(f"layer {layer} attends more than once, which cannot be followed in a tree.")
        if kind.keys_of is None and key_HKD.shape[1] != query_HQD.shape[1]:
            raise UnsupportedArchitecture(
                f"layer {layer} attends to {key_HKD.shape[1]} keys with {query_HQD.shape[1]} queries."
            )
        self._attended[layer] = end
        if kind.temperature:
            position_Q = self.positions_R[begin:end]
            query_HQD = warmer(query_HQD[:, : len(position_Q)], position_Q, *kind.temperature)
        if kind.index and kind.index.own:
            assert index_QF is not None, "a layer with an index of its own hands on its rows"
            key_HKD, value_HKD = with_index_key(key_HKD, value_HKD, index_QF, kind.index)
        style = Style(
            asked.scale, kind.window, kind.chunk, asked.softcap, asked.sinks_H, kind.together, self._rough, self._kept
        )
        dtype, query_HQD = query_HQD.dtype, self._kept.queries(query_HQD)
        if kind.keys_of is None:
            key_HKD, value_HKD = self._kept.keep(key_HKD), self._kept.keep(value_HKD)
        groups = self._joint.get((begin, end, kind))
        if groups is None:  # the same in all layers of a kind
            groups = self._joint[begin, end, kind] = joined(self._pieces(begin, end), style)
        trip = self._trip if self._trip and self._trip.carries(layer) else None
        found: dict[int, Tensor] = {}
        for group in groups:
            kvs = []
            for piece in group.pieces:
                node, new = piece.rows.start, (key_HKD[:, piece.here], value_HKD[:, piece.here])
                cache = self._spans[piece.text].cache
                if cache.queries is not None:
                    cache.queries.setdefault(layer, []).append(query_HQD[:, piece.here] * asked.scale)
                if kind.keys_of is not None:
                    kvs.append(cache.layers[kind.keys_of])  # all rows of that layer are there, whatever came last
                else:
                    kvs.append(trip.write(layer, piece.text, node, *new) if trip else cache.write(layer, node, *new))
            attended = (
                self._of_some_keys(kind, group.pieces, query_HQD, index_QF, kvs, style)
                if kind.index or kind.compressed
                else group.attend(query_HQD, kvs, style)
            )
            for piece, found_HQD in zip(group.pieces, attended, strict=True):
                found[piece.text] = self._kept.found(found_HQD, dtype).transpose(0, 1)
        if trip and end >= self.count:
            trip.leave(layer)
        mixed = [found[text] for text in sorted(found)]
        if end > self.count:
            mixed.append(mixed[-1][-1:].expand(end - self.count, -1, -1))
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0].contiguous()

    def _of_some_keys(
        self,
        kind: LayerKind,
        pieces: Items[TextRows],
        query_HQD: Tensor,
        index_QF: Tensor | None,
        kvs: list[LayerKV],
        style: Style,
    ) -> Iterator[Tensor]:
        """What each piece finds, where rows attend to keys that an index chooses, or that blocks of tokens become."""
        for piece, kv in zip(pieces, kvs, strict=True):
            own_HQD, own_QF = query_HQD[:, piece.here], None if index_QF is None else index_QF[piece.here]
            if kind.compressed:
                yield attend_compressed(own_HQD, kv, piece.sees, piece.rows, style, kind.compressed, own_QF)
                continue
            assert kind.index is not None
            at = piece.text, piece.rows.start
            if kind.index.own:
                assert own_QF is not None
                self._chosen[at] = choose(own_QF, kv, piece.sees, piece.rows, kind.index, style)
                kv = without_index_key(kv)
            yield attend_chosen(own_HQD, kv, piece.sees, piece.rows, style, kind.index, self._chosen[at])

    def _pieces(self, begin: int, end: int) -> list[TextRows]:
        """What every sequence has among the packed rows from `begin` to `end`."""
        pieces = []
        for number, span in enumerate(self._spans):
            first, last = max(begin, span.start), min(end, span.stop)
            if first < last:
                node = span.first_node + first - span.start
                rows = slice(node, node + last - first)
                pieces.append(TextRows(number, slice(first - begin, last - begin), rows, span.sees))
        return pieces

    def end(self) -> None:
        """Nothing of this sweep moves any more, however it ended."""
        if self._trip:
            self._trip.end()

    def finish(self) -> None:
        """The last layer is through. Every one must have been given every row, or the result is not to be trusted."""
        for layer, kind in self._kinds.items():
            if kind.attends and self._attended.get(layer, 0) < self.count:
                raise UnsupportedArchitecture(f"layer {layer} does not use the registered attention function.")
            if kind.recurrent and self.states.seen(layer) < self.count:
                raise UnsupportedArchitecture(f"layer {layer} computes its recurrence in a way that is not known yet.")
        self.states.finish()


def _passenger(span: _Span) -> Passenger:
    text = span.cache.rows
    return Passenger(span.cache, text + span.first_node, text + len(span.cache.parents))


def _on_grid(span: _Span, images: Images) -> Tensor:
    """Positions of the rows of one sequence on every axis, int64 [A, R]."""
    cache, position_R = span.cache, span.sees.position_R[span.first_node :]
    if not span.pictured:
        return position_R.expand(images.sight.axes, -1)
    chain = next((node for node, parent in enumerate(cache.parents) if parent != node - 1), len(cache.parents))
    places = images.positions([*cache.tokens, *cache.node_tokens[:chain]])
    return torch.from_numpy(places.at(position_R.cpu().numpy())).to(position_R.device)


def _span(part: Rows, start: int, device: torch.device, seeing: bool = False) -> _Span:
    cache = part.cache
    first_node = len(cache.parents)
    cache.node_tokens.extend(part.tokens)
    cache.parents.extend(part.parents)
    if part.settled:
        assert not first_node, "settled rows follow the text"
        cache.settled = part.settled
    parents_N = np.array(cache.parents, np.int64)
    times = intervals(parents_N)
    sees = Visibility(
        committed=cache.rows,
        position_R=torch.from_numpy(depths(parents_N) + cache.position).to(device),
        enter_R=torch.from_numpy(times.enter_N).to(device),
        leave_R=torch.from_numpy(times.leave_N).to(device),
        dropped=cache.dropped,
    )
    pictured = seeing and any(map(is_row, (max(cache.tokens, default=0), max(cache.node_tokens, default=0))))
    if pictured and (found := runs(cache.node_tokens)):
        image_N = np.full(len(cache.parents), -1)
        for run in found:
            image_N[run.start : run.stop] = run.start
        sees = replace(sees, image_R=torch.from_numpy(image_N).to(device))
    return _Span(cache, start, start + len(part.tokens), first_node, sees, pictured)
