"""The block behind a text, filled by a head that reads the target's hidden states. Knows no tree.

P places that guess   B rows of a block   H hidden size   S tokens that are named
"""

from __future__ import annotations

import torch

from specexec.drafters.heads.dflash import BlockHead, loaded
from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.lattice import Filled, LatticeDrafter
from specexec.drafters.kit import DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Named
from specexec.model.tree_lm import TreeLM
from specexec.sizes import PIECE
from specexec.text.sequence import Sequence


class BlockFiller:
    """A DFlash head beside its target. With a `window` it sees the first tokens and at least so many last ones."""

    def __init__(self, head: BlockHead, target: TreeLM, window: int | None = None) -> None:
        self.head, self.context = head.dflash, head.dflash.context
        self._target, self._out, self._window = target, head.out, window
        target.taps.want(self, self.head.fields.taps)

    def fill(self, sequence: Sequence) -> Filled | None:
        """Read what the target has processed since, then one pass; None where the target has not read the text."""
        taken, end = sequence.cache(self._target).taken, len(sequence.tokens) - 1
        if taken is None or taken.end != end:
            return None
        cache, taps = sequence.cache(self.head), self.head.fields.taps
        cache.forget_nodes()
        cache.window = self._window
        first = taken.first(taps)
        if len(cache) < first:  # states in between are missing: begin anew where they begin
            cache.rewind(0)
            cache.tokens, cache.unread = sequence.tokens[:first], first
        for at in range(len(cache), end, PIECE):
            new = sequence.tokens[at : min(at + PIECE, end)]
            states = [taken.between(tap, at, at + len(new)) for tap in taps]
            self.head.read(cache, new, torch.cat(states, -1))
        hidden_BH = self.head.fill(cache, sequence.tokens[-1])
        guessing_PH = hidden_BH[-self.head.fields.places :]
        with torch.no_grad():
            logits_PS = self._target.head(guessing_PH) if self._out is None else self._out(guessing_PH).float()
        return Filled(self.head.shaped(logits_PS), hidden_BH)


def make(kit: DrafterKit) -> Drafter:
    """A head from a folder of its own, for this target."""
    assert isinstance(kit.target, TreeLM)
    assert kit.head is not None
    target, ids, found = kit.target, kit.names, kit.head
    head = loaded(found.settings, found.tensors(), TargetSizes.of(target), found.name)
    named = Named(target.vocabulary, ids.rows, ids.never, target.device, head.ids)
    return LatticeDrafter(BlockFiller(head, target, kit.window), named, kit.ranking, found.name, head.following)
