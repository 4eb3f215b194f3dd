"""The memory of a target and of all that lies beside it: what `plan` promises and what `load` then does.

Read from headers and configs alone. Knows no torch and no machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from offload import (
    FewBits,
    Folder,
    Format,
    Free,
    Need,
    Placement,
    cache_rows_B,
    cache_widths,
    copy_B,
    is_quantised,
    looked_up_B,
    mtp_B,
    need_in,
    resident_B,
    tower_B,
    with_cache,
    with_head,
)
from offload import item_B as stored_item_B
from specexec.compose.head_folders import as_model, head_kind, read_layers, tap_count, tries
from specexec.compose.load_options import LoadOptions
from specexec.drafters.registry import DrafterChoice
from specexec.errors import UnsupportedArchitecture
from specexec.model.recurrent.sizes import recurrences_of
from specexec.planning.memory_room import Room
from specexec.sizes import (
    F32_B,
    F64_B,
    FIRST_NODES,
    KERNELS_B,
    SEEING,
    SKIP_SHARE,
    STATES,
    TRIED_ROWS,
    Widths,
    drafting_B,
    guesses_B,
    images_B,
    node_B,
    nodes_of,
    snapshots_B,
    text_B,
    widths_of,
    windowed,
    workspace,
)

if TYPE_CHECKING:
    from specexec.drafters.few_bits import Form

TOY_BUDGET = 32  # a pass of the toy is all overhead, so no guess would ever pay: it shows the engine instead
DTYPE_B = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class LoadRequest:
    """A target, the models that may draft for it, and how all of them are to be loaded."""

    target: Folder
    drafters: tuple[Folder, ...]
    options: LoadOptions
    budget: int | Literal["auto"]
    context: int
    most_nodes: int
    """Guesses of the largest sweep under an automatic budget."""
    branches: bool
    """Whether the target verifies trees: then its keys and values may live in RAM."""
    on_cpu: bool
    plainly: str = ""
    """Why the target gets one token a sweep, where that is known."""
    form: Format = "none"
    """What the target's layers are packed into first; `load` takes them as they are."""

    @classmethod
    def of(
        cls,
        target: Folder,
        drafters: tuple[Folder, ...],
        options: LoadOptions,
        context: int,
        free: Free,
        *,
        branches: bool = True,
        plainly: str = "",
        toy: bool = False,
    ) -> LoadRequest:
        """Settle what depends on the memory that is free."""
        budget = TOY_BUDGET if toy and options.budget == "auto" and options.link_limit_Bps is None else options.budget
        bare = cls(
            target, tuple(map(as_model, drafters)), options, budget, context, 0, branches, free.vram_B is None, plainly
        )
        free_B = free.ram_B if free.vram_B is None else free.vram_B
        bare.check_cache()
        return replace(bare, most_nodes=nodes_of("auto", bare.own_widths, context, free_B))

    def check_cache(self) -> None:
        """Raise UnsupportedArchitecture where keys and values are to be in few bits, or on disk, and there are none of
        ours.
        """
        refused = {
            "--kv-quant": self.options.kv_quant is not None and bool(self.plainly),
            "--kv disk": self.options.kv == "disk" and not self.branches,
        }
        if any(refused.values()):
            asked = next(name for name, is_refused in refused.items() if is_refused)
            raise UnsupportedArchitecture(
                f"{asked} needs a model that verifies trees: others keep their keys and values themselves.",
                self.plainly or None,
                f"leave {asked} out.",
            )
        if self.options.kv_quant is None:
            return
        if not any(cache_widths(self.target.config)):
            raise UnsupportedArchitecture(
                f"no layer of {self.target.path} keeps keys and values: --kv-quant has nothing to do.",
                hint="leave --kv-quant out.",
            )

    @property
    def nodes(self) -> int:
        """Guesses of the largest sweep."""
        return self.most_nodes if self.budget == "auto" else self.budget

    @property
    def draft_rows(self) -> int:
        """Rows of a text that a drafter keeps at most."""
        return windowed(self.context, self.options.draft_window)

    @property
    def copy(self) -> Form:
        """What `substitute` makes of the target's layers."""
        return "nf4" if self.options.drafter_quant == "none" else self.options.drafter_quant

    def item_B(self, folder: Folder) -> int:
        """Bytes of a number that this model computes with; a head computes with those of its target."""
        is_head = folder is not self.target and head_kind(folder) is not None
        return DTYPE_B.get(self.options.dtype) or stored_item_B(self.target if is_head else folder)

    def widths(self, folder: Folder) -> Widths:
        """The sizes of a model that decide."""
        item_B = self.item_B(folder)
        widths = widths_of(folder.config, item_B, cache_widths(folder.config))
        states = recurrences_of(folder.config)
        return replace(
            widths,
            states_B=states.text_B(item_B),
            node_states_B=states.node_B(item_B),
            state_heads=max((layer.heads for layer in states.layers.values()), default=0),
            state_row_B=max((layer.row_B for layer in states.layers.values()), default=0),
            states_at_once_B=max((layer.most_B for layer in states.layers.values()), default=0),
        )

    def states_B(self, nodes: int) -> dict[int, int]:
        """What each recurrent layer of the target keeps of one text and of guesses below it, by number."""
        item_B, layers = self.item_B(self.target), recurrences_of(self.target.config).layers
        return {at: STATES * layer.text_B(item_B) + nodes * layer.node_B(item_B) for at, layer in layers.items()}

    @property
    def own_widths(self) -> Widths:
        """Those of the target as it verifies: with its keys and values in the bits that were asked for."""
        widths, bits = self.widths(self.target), self.options.kv_quant
        if bits is None:
            return widths
        return replace(widths, token_B=sum(cache_rows_B(self.target.config, bits)), sum_B=F64_B)

    def bits(self, folder: Folder) -> FewBits:
        """What the layers of a drafter model become: one that is quantised already stays as it is, and so do heads."""
        return "none" if is_quantised(folder) or head_kind(folder) else self.options.drafter_quant

    def in_ram(self, folder: Folder) -> bool:
        """Whether this drafter computes in RAM, beside a target on a GPU."""
        return self.options.drafter_device == "cpu" and not self.on_cpu and head_kind(folder) is None

    def tapped_B(self, folder: Folder) -> int:
        """Hidden states of one token of the target that a head reads."""
        hidden = self.widths(self.target).hidden
        return tap_count(folder, hidden) * hidden * self.item_B(self.target)

    def tried_B(self, folder: Folder) -> int:
        """Hidden states by which a head finds out which it reads: of one sweep, and kept of a text."""
        if not tries(folder):
            return 0
        return 2 * TRIED_ROWS * (self.tapped_B(folder) + self.widths(self.target).hidden * self.item_B(self.target))


@dataclass(frozen=True)
class MemoryPlan:
    """What the caller of offload takes beside the target and the keys and values of its text."""

    beside_B: dict[str, int]
    """Where the computation is, by what it is for."""
    beside_ram_B: dict[str, int]
    """What of it lies in RAM even beside a GPU: a drafter's token ids are looked up as the target's are, and all of one
    that computes there."""
    guesses_B: int
    """Keys and values of guesses."""
    states_B: dict[int, int]
    """What recurrent layers keep, by number."""
    cache_stays: frozenset[int] = frozenset()
    """Layers of the target whose keys and values stay where the computation is, because a drafter attends to them."""


def memory_plan(request: LoadRequest, choice: DrafterChoice) -> MemoryPlan:
    """What goes to guesses and to these drafters. Skipping in a resident target is free, but it is not placed yet."""
    target, nodes = request.target, request.nodes if choice.sources else 0
    widths, item_B = request.own_widths, request.item_B(target)
    drafter_B = int(SKIP_SHARE * sum(target.file_sizes.values())) if "skip" in choice.sources else 0
    if "substitute" in choice.sources:
        drafter_B += sum(copy_B(target, request.copy, item_B))  # quantised layer by layer
    if choice.heads:
        drafter_B += mtp_B(target, item_B)
    beside_B = {False: drafter_B, True: 0}  # where the target computes, and in RAM beside that
    for in_ram in beside_B:
        for drafter in drafting(request, choice, in_ram):
            beside_B[in_ram] += drafter.token_B * request.draft_rows
            beside_B[in_ram] += drafting_B(drafter, request.context, nodes, request.options.draft_window)
    embeddings_B = 0
    for folder in _models(request, choice):
        number_B, bits, in_ram = request.item_B(folder), request.bits(folder), request.in_ram(folder)
        lookups_B = looked_up_B(folder, bits, number_B)
        embeddings_B += lookups_B
        beside_B[in_ram] += resident_B(folder, bits, number_B, 0, on_gpu=not (request.on_cpu or in_ram)) - lookups_B
        beside_B[in_ram] += request.tapped_B(folder) * (request.context + nodes)  # while a sweep runs
        beside_B[in_ram] += request.tried_B(folder)
        beside_B[in_ram] += 3 * (request.options.draft_vocab or 0) // 2 * request.widths(folder).hidden * number_B
    sees = target.wrapper is not None and target.architecture in SEEING and request.branches
    seen_B = tower_B(target, item_B) + images_B(target.whole_config, widths, request.context) if sees else 0
    return MemoryPlan(
        {
            **workspace(widths, request.context, nodes),
            **({"kernels": KERNELS_B} if request.on_cpu and item_B == F32_B else {}),
            "drafter": beside_B[False],
            **({"images and their tower": seen_B} if sees else {}),
        },
        {
            "snapshots of recurrent states": snapshots_B(widths),
            **({"embeddings of the drafter": embeddings_B} if choice.models else {}),
            **({"drafter": beside_B[True]} if beside_B[True] else {}),
        },
        guesses_B(widths, request.context, nodes),
        request.states_B(nodes),
        frozenset(layer for folder in _models(request, choice) for layer in read_layers(folder, target)),
    )


def need_with(request: LoadRequest, choice: DrafterChoice) -> Need:
    """The need of the target with these drafters.

    Raises UnsupportedModel where its head is to get four bits and has few already.
    """
    beside = memory_plan(request, choice)
    item_B = request.item_B(request.target)
    compute = request.options.compute
    plain = need_in(request.target, request.form, item_B, request.context, beside.beside_B, compute)
    plain = with_cache(plain, request.target.config, request.options.kv_quant)
    return replace(
        with_head(request.target, plain, request.options.head_quant, item_B),
        guesses_B=beside.guesses_B,
        states_B=beside.states_B,
        cache_moves=request.branches,
        cache_stays=plain.cache_stays | beside.cache_stays,
        beside_ram_B=beside.beside_ram_B,
    )


def drafting(request: LoadRequest, choice: DrafterChoice, in_ram: bool = False) -> list[Widths]:
    """Models that draft with keys and values of their own, where the target computes; or those in RAM beside that."""
    models = [_drafting(request, one) for one in _models(request, choice) if request.in_ram(one) == in_ram]
    if in_ram:
        return models
    own = request.widths(request.target)
    copies = [own for _ in choice.copies]
    one_layer = replace(
        own,
        keeping=1,
        token_B=own.kept * own.item_B,
        states_B=0,
        node_states_B=0,
        state_heads=0,
        state_row_B=0,
        states_at_once_B=0,
        reads_B=own.hidden * own.item_B,
    )
    return [*models, *copies, *(one_layer for _ in choice.heads)]


def _drafting(request: LoadRequest, folder: Folder) -> Widths:
    """The sizes of a drafter model, and what a head reads; EAGLE's go in as wide as embeddings and features are."""
    widths = replace(request.widths(folder), reads_B=request.tapped_B(folder))
    return replace(widths, hidden=2 * widths.hidden) if tries(folder) else widths


def room_for_texts(placement: Placement, free: Free, request: LoadRequest, choice: DrafterChoice) -> Room:
    """What is left for texts: what the placement has set aside for one, and half of what is not asked for."""
    nodes, drafters = request.nodes if choice.sources else 0, drafting(request, choice)
    need = placement.need
    shares_B = need.shares_B(need.cache_B)
    travelling_B = sorted(size_B for size_B, tier in zip(shares_B, placement.caches, strict=True) if tier != "device")

    def side(one: Room, living_B: int, spare_B: int) -> Room:
        """A memory in which so much of a whole context's keys and values lives."""
        one = replace(one, token_B=-(-living_B // need.ctx))
        return replace(one, free_B=one.need_B(request.context, nodes) + max(spare_B, 0) // 2)

    bare = Room(0, 0, least=min(nodes, FIRST_NODES), most=request.most_nodes, rows=request.context)
    of_text_B, with_one_B, widths = request.states_B(0), request.states_B(1), request.widths(request.target)
    away = [layer for layer, tier in enumerate(placement.caches) if tier == "ram" and layer in of_text_B]
    text_away_B = sorted(of_text_B[layer] for layer in away)
    node_away_B = sorted(with_one_B[layer] - of_text_B[layer] for layer in away)
    here = replace(
        widths,
        states_B=widths.states_B - sum(text_away_B[:-3]) // STATES,
        node_states_B=widths.node_states_B - sum(node_away_B[:-3]),
    )
    computing = replace(
        bare,
        draft_B=sum(drafter.token_B for drafter in drafters),
        draft_rows=request.draft_rows,
        node_B=node_B(here, drafters),
        text_B=text_B(here, drafters),
    )
    earlier_B = snapshots_B(widths)
    on_disk = "disk" in placement.caches
    disk = side(bare, sum(travelling_B), 0) if on_disk else None
    living_B = need.cache_B - sum(travelling_B[:-2])  # two layers' worth is there at a time of those that travel
    if free.vram_B is None or placement.device_B is None:
        computing = replace(computing, text_B=computing.text_B + earlier_B, beside=disk)
        return side(computing, living_B, free.ram_B - placement.host_B)
    apart = drafting(request, choice, in_ram=True)
    bare = replace(
        bare,
        draft_B=sum(drafter.token_B for drafter in apart),
        draft_rows=request.draft_rows,
        node_B=sum(node_away_B) + node_B(widths, apart) - node_B(widths, ()),
        text_B=earlier_B + sum(text_away_B) + text_B(widths, apart) - text_B(widths, ()),
        beside=disk,
    )
    in_ram = bool(travelling_B or apart) or earlier_B > 0
    ram_B = 0 if on_disk else sum(travelling_B)
    ram = side(bare, ram_B, free.ram_B - placement.host_B) if in_ram else None
    return side(replace(computing, beside=ram), living_B, free.vram_B - placement.device_B)


def _models(request: LoadRequest, choice: DrafterChoice) -> tuple[Folder, ...]:
    return request.drafters if choice.models else ()
