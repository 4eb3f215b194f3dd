"""Attention of several short texts in one call, because the cost of a call would else be paid for each of them.

B pieces   H query heads   Q query rows   K key rows   D head size
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.model.attention import Style, Visibility, attend, attend_block
from specexec.model.cache import LayerKV
from specexec.sizes import KEY_BLOCK, QUERY_BLOCK


@dataclass(frozen=True)
class TextRows:
    """Some rows of text number `text`: the nodes `rows` of its cache, at `here` among the rows of a part of a sweep."""

    text: int
    here: slice
    rows: slice
    sees: Visibility

    @property
    def queries(self) -> int:
        return self.here.stop - self.here.start

    @property
    def keys(self) -> int:
        return self.sees.committed + self.rows.stop


class JointAttention:
    """Pieces of about one size, padded to the longest. Which row sees which is found once for all layers of a kind."""

    def __init__(self, pieces: Items[TextRows], style: Style) -> None:
        self.pieces = pieces
        self._queries, self._keys = (max(size) for size in zip(*((p.queries, p.keys) for p in pieces), strict=True))
        if len(pieces) == 1:
            return
        # Rows before the first that any query sees may not be there: they could have stayed in another memory.
        self._first = [piece.sees.first_visible(piece.rows, style) for piece in pieces]
        device = pieces[0].sees.position_R.device
        self._hidden_BQK = torch.zeros(len(pieces), self._queries, self._keys, dtype=torch.bool, device=device)
        for hidden_QK, piece in zip(self._hidden_BQK, pieces, strict=True):
            hidden_QK[:, piece.keys :] = True
            hidden = piece.sees.hidden(piece.rows, 0, piece.keys, style)
            if hidden is not None:
                hidden_QK[: piece.queries, : piece.keys] = hidden
        # Padding repeats a piece's last query; whatever it finds is dropped.
        at = [min(piece.here.start + i, piece.here.stop - 1) for piece in pieces for i in range(self._queries)]
        self._at_BQ = torch.tensor(at, device=device)

    def attend(self, query_HQD: Tensor, kvs: Items[LayerKV], style: Style) -> list[Tensor]:
        """What each piece finds among its own keys, [H, Q, D of values] in the dtype of the query, in their order.

        `query_HQD` holds the queries of all pieces, `kvs` the keys and values of each, on one device.
        """
        if len(self.pieces) == 1:
            (piece,), (kv,) = self.pieces, kvs
            return [attend(query_HQD[:, piece.here], kv.keys_HRD, kv.values_HRD, piece.sees, piece.rows, style)]
        texts, hidden = len(self.pieces), self._hidden_BQK[:, None, None]
        query_HBQD = query_HQD[:, self._at_BQ].unflatten(1, (texts, self._queries))
        keys, values = self._padded([kv.keys_HRD for kv in kvs]), self._padded([kv.values_HRD for kv in kvs])
        mixed_HQD = attend_block(
            query_HBQD.transpose(0, 1).flatten(0, 1),
            keys,
            values,
            range(self._keys),
            lambda first, last: hidden[..., first:last],
            style,
            texts,
        )
        mixed = zip(mixed_HQD.chunk(texts), self.pieces, strict=True)
        return [own_HQD[:, : piece.queries] for own_HQD, piece in mixed]

    def _padded(self, rows: Items[Tensor]) -> Tensor:
        heads, _, size = rows[0].shape
        padded_BHKD = rows[0].new_zeros(len(rows), heads, self._keys, size)
        for padded_HKD, rows_HRD, piece, first in zip(padded_BHKD, rows, self.pieces, self._first, strict=True):
            padded_HKD[:, first : piece.keys] = rows_HRD[:, first : piece.keys]
        return padded_BHKD.flatten(0, 1)


def joined(pieces: Items[TextRows], style: Style) -> list[JointAttention]:
    """Pieces of like size together, no group larger than a block of attention; a large piece stays alone."""
    alike: dict[tuple[int, int], list[list[TextRows]]] = {}
    for piece in pieces:
        groups = alike.setdefault((piece.queries.bit_length(), piece.keys.bit_length()), [[]])
        together = [*groups[-1], piece]
        queries, keys = max(one.queries for one in together), max(one.keys for one in together)
        if len(together) > 1 and (len(together) * keys > KEY_BLOCK or len(together) * queries > QUERY_BLOCK):
            groups.append([piece])
        else:
            groups[-1].append(piece)
    return [JointAttention(group, style) for groups in alike.values() for group in groups]
