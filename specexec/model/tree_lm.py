"""A causal LM that takes trees: one sweep = one packed row of nodes over all live sequences, hidden states out.

Works on any transformers model, streamed or resident, through its own modelling code. Knows no file and no drafter.
R packed rows   H hidden size   V vocabulary
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from specexec.errors import UnsupportedArchitecture
from specexec.model import attention
from specexec.model.architecture import check_tree_support, limits_steps, longest_text
from specexec.model.cache import KVCache, Room, beside
from specexec.model.cache_in_ram import Travel
from specexec.model.compressed import let_in_compressors
from specexec.model.image_inputs import inputs_of, seeing
from specexec.model.image_rows import Images
from specexec.model.indexed import let_in_indexers
from specexec.model.kept_rows import WHOLE, KeptRows, KVQuant, kept_rows
from specexec.model.linears import any_rows
from specexec.model.linears import float32_linears as widened
from specexec.model.linears import row_tiles as tiles
from specexec.model.module_types import TakesChunks
from specexec.model.recurrent.seams import let_in, sweeping
from specexec.model.sweep_rows import SweepRows
from specexec.model.taps import LAST, Taps
from specexec.sizes import CHUNK


@dataclass(frozen=True)
class Rows:
    """New nodes for one sequence: `tokens` are ids, `parents` indices of nodes, of equal length, parents first.

    Indices count on from the nodes that its cache already holds; ROOT (-1) follows the committed text.

    The first `settled` of them, if its cache holds none, are a chain that is text already, or is not to be committed at
    all: recurrent layers then keep its last state alone. All others hang at its end.

    `features_RF`: what a model reads of each row beside its token, if it reads any (`TreeLM.mix`). `read`: the cache of
    a model that has read the text, whose keys and values rows attend to, if they do (`drafters/heads/read_text.py`).
    """

    cache: KVCache
    tokens: Items[int]
    parents: Items[int]
    settled: int = 0
    features_RF: Tensor | None = None
    read: KVCache | None = None

    @classmethod
    def text(cls, cache: KVCache, tokens: Items[int]) -> Rows:
        """Tokens one after the other, settled."""
        return cls(cache, tokens, range(-1, len(tokens) - 1), len(tokens))


class Sweep:
    """One pass over the weights, running in the background."""

    def __init__(self, future: Future[list[Tensor]], cancelled: threading.Event) -> None:
        self._future = future
        self._cancelled = cancelled

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def cancel(self) -> None:
        """Stop after the current layer; `result` then raises SweepCancelled."""
        self._cancelled.set()

    def result(self) -> list[Tensor]:
        """Final hidden states of each sequence's new nodes, [R, H] each, in the model's dtype. Waits for the sweep.

        Raises what the sweep raised: SweepCancelled, offload's ReadFailed, torch's own out-of-memory errors.
        """
        return self._future.result()

    def wait(self) -> None:
        """Until the sweep no longer touches anything, however it ended."""
        wait([self._future])


class TreeLM:
    """A transformers causal LM with a tree cache and tree attention (SpecInfer, arXiv 2305.09781).
    Compared and hashed by identity: caches are kept per LM. Raises UnsupportedArchitecture for a model that cannot take
    trees.

    `layers` are the numbers its layers know themselves by, where they are not 0, 1, 2, … (partial.py); None is a layer
    that does not attend (sublayers.py). `travel` says whose keys and values live in RAM, `share` how a CPU's threads
    divide a product. `drafts`: it only guesses, so that nothing depends on its bits; it computes the rows there are, it
    attends in its own dtype where that is quicker, and reads ids beyond its own, which a target may have, as the last.
    Without `tiled` a sweep computes the rows that it has and no more: for linears that give a row the same bits anyway.
    `images` are those whose rows may be among the tokens. `mix` makes what goes into the first layer, [R, H], of token
    ids [R] and the rows' features [R, F]; without it that are the embeddings of the ids. `kept` says how keys and
    values lie in its caches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Items[int | None] | None = None,
        travel: Travel | None = None,
        share: widened.Share = widened.in_turn,
        drafts: bool = False,
        tiled: bool = True,
        mix: Callable[[Tensor, Tensor], Tensor] | None = None,
        images: Images | None = None,
    ) -> None:
        self._drafts, self._mix, self.images = drafts, mix, images
        self.kinds = seeing(check_tree_support(type(model), model.config), images)
        self._layers = range(len(self.kinds)) if layers is None else layers
        self._travel = travel
        self.share = share
        self.model = model
        self.model.set_attn_implementation(attention.NAME)
        attention.leave_temperatures(model)
        let_in_indexers(model)
        # The head is where the computation is; token ids may be looked up elsewhere.
        self.device = next(model.get_output_embeddings().parameters()).device
        self._rough = drafts and self.device.type == "cpu" and model.dtype.itemsize == 2
        self._any_rows = not drafts and any_rows.needed(self.device, model.dtype)
        self._tiled = tiled and not drafts and not self._any_rows
        self.vocabulary: int = int(model.config.vocab_size)
        self.context: int = longest_text(model.config)
        self._streamed = [layer for layer in model.modules() if isinstance(layer, TakesChunks)]
        for layer in self._streamed:  # they can take long prompts in pieces, at one visit of the weights
            layer.chunk_rows = CHUNK
        self._trunk: nn.Module = model.get_submodule(trunk_name(model))
        self._head = head_alone(model)
        self.taps = Taps(model)
        numbered = zip(self._layers, self.kinds, strict=True)
        recurrent = {number for number, kind in numbered if kind.recurrent and number is not None}
        if recurrent and (missed := recurrent - let_in(model) - let_in_compressors(model)):
            raise UnsupportedArchitecture(f"layer {min(missed)} has no recurrence that can be given a tree.")
        self._stepwise = limits_steps(model.config.get_text_config())
        self._experts = any(name.endswith("experts") for name, _ in model.named_modules())
        # Linears that are no modules of torch's own class are met where they are called.
        own = self._any_rows or widened.pays(self.device, model.dtype)
        self._met = own and (not any_rows.convert(model, self.device, share) or self._experts)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sweep")
        self.kept: KeptRows = WHOLE
        self._even = False  # whether each product has as many rows as another

    def memory_of(self, layer: int) -> Room:
        """Where rows of this layer live between sweeps."""
        if self._travel is None or layer not in self._travel.layers:
            return beside
        return self._travel.carrier.memory

    def keep_in(self, bits: KVQuant) -> None:
        """From now on caches hold keys and values in so many bits; for an LM that has written none yet.

        Raises UnsupportedArchitecture where no layer has keys and values.
        """
        if not any(kind.attends for kind in self.kinds):
            raise UnsupportedArchitecture(
                "no layer of this model keeps keys and values, so that there is nothing to keep in few bits.",
                hint="leave --kv-quant out.",
            )
        self.kept = kept_rows(bits)
        self._even = self.device.type != "cpu" or self.model.dtype.itemsize < 4

    @contextmanager
    def keeping_whole(self) -> Iterator[None]:
        """While this is open sweeps with caches of their own keep keys and values as they are computed."""
        kept, self.kept = self.kept, WHOLE
        try:
            yield
        finally:
            self.kept = kept

    def alike(
        self,
        model: PreTrainedModel,
        layers: Items[int | None] | None = None,
        mix: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> TreeLM:
        """A drafter that computes as this one does: over some of its layers, over copies of them, or over others."""
        images = self.images if mix is None else None
        return TreeLM(model, layers, share=self.share, drafts=True, mix=mix, images=images)

    def begin(self, parts: list[Rows]) -> Sweep:
        """Start a sweep over the new rows of several sequences; the caller is free to do something else meanwhile."""
        cancelled = threading.Event()
        return Sweep(self._worker.submit(self.forward, parts, cancelled), cancelled)

    @torch.no_grad()
    def forward(self, parts: list[Rows], cancelled: threading.Event | None = None) -> list[Tensor]:
        """Hidden states [R, H] of each part's rows, in the model's dtype. Raises as `Sweep.result` does.

        A transaction: on any error all caches forget the new nodes.
        """
        held = [len(part.cache.parents) for part in parts]
        tapped: dict[int, Tensor] = {}
        taps = self.taps.of(sum(len(part.tokens) for part in parts))
        for part in parts:
            part.cache.stepwise = self._stepwise
        try:
            numbered = zip(self._layers, self.kinds, strict=True)
            kinds = {number: kind for number, kind in numbered if number is not None}
            cancelled = cancelled or threading.Event()
            packed = SweepRows(parts, kinds, self.device, cancelled, self._travel, self.images, self._rough, self.kept)
            try:
                features = [part.features_RF for part in parts if part.features_RF is not None]
                with self.taps.record(taps, tapped):
                    hidden_RH = self._run(packed, torch.cat(features) if features else None)
                packed.finish()
            finally:
                packed.end()
        except BaseException:
            for part, nodes in zip(parts, held, strict=True):
                part.cache.forget_nodes(after=nodes)
            raise
        counts = [len(part.tokens) for part in parts]
        if LAST in taps:
            tapped[LAST] = hidden_RH
        for tap, rows_RH in tapped.items():
            for part, own_RH in zip(parts, rows_RH[: packed.count].split(counts), strict=True):
                part.cache.tapped[tap] = own_RH
        return list(hidden_RH.split(counts))

    def _run(self, packed: SweepRows, features_RF: Tensor | None) -> Tensor:
        together = packed.images if any(kind.together for kind in self.kinds) else []
        for layer in self._streamed:
            layer.tokens = packed.tokens
            layer.together = [range(run.start, run.stop) for run in together]
        tokens_R = packed.tokens_R.clamp(max=self.vocabulary - 1) if self._drafts or packed.images else packed.tokens_R
        # In float32 a single row would have to be doubled for every linear.
        count = tiles.padded(packed.count) if self._tiled else any_rows.LEAST if self._any_rows else 0
        rows = (tokens_R, packed.positions_R)
        input_ids, position_ids = (tiles.filled_up(each_R, count) for each_R in rows)
        given = {"input_ids": input_ids.unsqueeze(0), "position_ids": position_ids.unsqueeze(0)}
        if self.images is not None:
            given |= inputs_of(self._trunk, self.images, packed.images, given, packed.grid_AR)
        with self.linears(), sweeping(packed.states):
            if self._mix is not None:
                assert features_RF is not None
                filled_RF = tiles.filled_up(features_RF, count)
                given["inputs_embeds"] = self._mix(given.pop("input_ids")[0], filled_RF).unsqueeze(0)
            output = self._trunk(**given, use_cache=False, sweep=packed)
        hidden_RH: Tensor = output.last_hidden_state[0, : packed.count]
        return hidden_RH

    @torch.no_grad()
    def head(self, hidden_RH: Tensor, head: PreTrainedModel | None = None) -> Tensor:
        """Logits [R, V] in float32 of hidden states [R, H], by the model's own head code (soft-caps, scales included).

        `head`: what `head_alone` made of the model, with another head in it.
        """
        own = head or self._head
        with self.linears():
            tile = 1 if self._drafts or self._any_rows else tiles.TILE
            return tiles.tiled(lambda part: own(inputs_embeds=part.unsqueeze(0)).logits[0], hidden_RH, tile).float()

    def linears(self) -> ExitStack:
        """While this is open linears run in the way that is quick here and the same for any number of rows."""
        with ExitStack() as ways:
            if self._met:
                ways.enter_context(any_rows.linears(self.device, self.model.dtype, self.share))
            if self._experts or self._even:
                ways.enter_context(tiles.RowTiles(self._even))
            return ways.pop_all()

    def close(self) -> None:
        """Let the worker thread go."""
        self._worker.shutdown(wait=False, cancel_futures=True)


class _Rows(MoeModelOutputWithPast):
    """Hidden states alone: heads hand on more, each something else."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Replaces the layers: the hidden states are already there."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> MoeModelOutputWithPast:
        return _Rows(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> nn.Module:
        return self  # OPT asks its trunk for the decoder


def trunk_name(model: PreTrainedModel) -> str:
    """The child that makes hidden states: the one that the class names, or the model inside it (Llama 4)."""
    children = dict(model.named_children())
    if model.base_model_prefix in children:
        return model.base_model_prefix
    return next(name for name, child in children.items() if isinstance(child, PreTrainedModel))


def head_alone(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, parameters shared, whose trunk hands through what it is given."""
    head = copy.copy(model)
    head._modules = dict(model._modules)
    given = head._modules[trunk_name(model)] = _Given()
    for name, value in vars(model.get_submodule(trunk_name(model))).items():
        if isinstance(value, float):  # Falcon-H1 keeps the scale of its logits there
            setattr(given, name, value)
    return head
