"""Does modelling code that we have not tried compute what trees need? Tried here before a text is written.

Our tests compare transformers' own architectures with plain decoding (docs/architectures.md); others, and code from a
checkpoint, are compared here, with themselves: the same tokens as straight texts, without cache, tree or mask of ours,
and a prompt that goes through layers in pieces. Costs four or five sweeps.
B texts   T tokens of a text   L tokens of a prompt   V vocabulary
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specexec.errors import SpecexecError, UnsupportedArchitecture
from specexec.model.architecture import longest_text
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Travel
from specexec.model.chain_lm import ChainLM
from specexec.model.image_rows import Images
from specexec.model.linears.float32_linears import Share, in_turn
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sizes import CHUNK

log = logging.getLogger(__name__)

# Two texts that part after three tokens, and the same two as a tree.
PARENTS = [-1, 0, 1, 2, 2, 3, 4]
PATHS = [[0, 1, 2, 3, 5], [0, 1, 2, 4, 6]]
PIECES = CHUNK + 8  # tokens of a prompt that does not go through a layer at once
# Model types of transformers that scripts/zoo.py has tried, one a line.
TRIED = Path(__file__).with_name("tried_types.txt")
# Of the spread of all logits: what another order of sums may change. A wrong neighbour changes them by tens of percent.
TOLERANCE = {torch.float32: 1e-3}
COARSE = 0.1


def is_tried(model_type: str, own_code: bool = False) -> bool:
    """Whether a model of this type was compared with itself before: transformers' own, not code of a checkpoint."""
    return not own_code and model_type in TRIED.read_text(encoding="utf-8").split()


def lm_of(
    model: PreTrainedModel,
    *,
    trees: bool,
    tried: bool,
    travel: Travel | None = None,
    share: Share = in_turn,
    tiled: bool = True,
    images: Images | None = None,
) -> TreeLM | ChainLM:
    """A TreeLM where the architecture allows it, else a ChainLM; `load` has refused drafters where it does not.

    With `tried`, what the class says of itself is checked. Raises UnsupportedArchitecture, also for code that
    cannot take the `trees` that a drafter needs.
    """
    trial, own_attention = ReferenceOutput(model) if tried else None, model.config._attn_implementation
    try:
        tree_lm = TreeLM(model, travel=travel, share=share, tiled=tiled, images=images)
        return trial.tree(tree_lm) if trial else tree_lm
    except UnsupportedArchitecture as problem:
        if trees and trial:
            raise
        log.info("%s", problem.what)
        model.set_attn_implementation(own_attention)
        chain_lm = ChainLM(model)
        return trial.chain(chain_lm) if trial else chain_lm


class ReferenceOutput:
    """What the model's own forward pass says about both texts; made before its attention is replaced."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        most = int(model.config.vocab_size)
        self.name = str(model.config.model_type)
        self.tokens = [(node + 1) * most // (len(PARENTS) + 1) for node in range(len(PARENTS))]
        device = next(model.get_output_embeddings().parameters()).device
        texts_BT = torch.tensor([[self.tokens[node] for node in path] for path in PATHS], device=device)
        rows = min(PIECES, longest_text(model.config))
        self.prompt = [(3 * place + 1) % most for place in range(rows)]
        short = "logits_to_keep" in inspect.signature(model.forward).parameters
        last = {"logits_to_keep": 1} if short else {}
        with self._running():
            self.logits_BTV = model(input_ids=texts_BT, use_cache=False).logits.float()
            prompt_1L = torch.tensor([self.prompt], device=device)
            self.last_1V = model(input_ids=prompt_1L, use_cache=False, **last).logits[0, -1:].float()
        self.tolerance = TOLERANCE.get(model.dtype, COARSE)

    def tree(self, lm: TreeLM) -> TreeLM:
        """The same LM, if it computes in a tree what it computes in a straight text."""
        with self._running():
            (hidden_NH,) = lm.forward([Rows(KVCache(), self.tokens, PARENTS)])
            logits_NV = lm.head(hidden_NH)
            (hidden_LH,) = lm.forward([Rows.text(KVCache(), self.prompt)])
            last_1V = lm.head(hidden_LH[-1:])
        self._compare(last_1V, self.last_1V, "verify trees", "where a prompt goes in pieces")
        self._compare(torch.stack([logits_NV[path] for path in PATHS]), self.logits_BTV, "verify trees", "in a tree")
        return lm

    def chain(self, lm: ChainLM) -> ChainLM:
        """The same LM, if going on from what it keeps gives what the whole text gives."""
        cache, text = KVCache(), [self.tokens[node] for node in PATHS[0]]
        with self._running():
            (early_RH,) = lm.forward([Rows(cache, text[:3], range(-1, 2))])
            cache.commit(range(3))
            (late_RH,) = lm.forward([Rows(cache, text[3:], range(-1, 1))])
            logits_TV = lm.head(torch.cat([early_RH, late_RH]))
        self._compare(logits_TV, self.logits_BTV[0], "be streamed", "when it goes on from its cache")
        return lm

    def _compare(self, found: Tensor, wanted: Tensor, what: str, when: str) -> None:
        off = float((found - wanted).abs().max() / wanted.std())
        if not off <= self.tolerance:
            raise UnsupportedArchitecture(
                f"architecture {self.name!r} cannot {what}: its code computes something else {when} "
                f"(off by {off:.2g} of the spread of its logits, {self.tolerance:g} is rounding).",
                hint="--drafter none streams it with plain decoding, one token a sweep." if "tree" in what else None,
            )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Foreign code may raise anything; all of it means that the model cannot be used."""
        try:
            yield
        except SpecexecError:
            raise
        except Exception as error:
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise UnsupportedArchitecture(
                f"the code of architecture {self.name!r} does not work here.", f"{type(error).__name__}: {first}"
            ) from error
