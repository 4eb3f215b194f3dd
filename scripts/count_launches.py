"""How many kernels a GPU is asked for: per layer of the target, per sweep, per pass of the drafter; no GPU is needed.

Tiny models on the simulated device of the tests: what is launched does not depend on how wide a model is. One operation
of torch that computes something counts as one launch (some are several kernels on a GPU); looking at memory in another
shape is none. `products` are matrix products (those of attention are its own), `unpack` is dequantising, `waits` how
often the host waits for the device. The aim is 12 launches a layer beyond products and unpacking.

    python scripts/count_launches.py --nodes 1,64,1024
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import offload
from offload.checkpoint.block import Block
from offload.machine.memory import Free
from offload.model import load
from offload.model.layer import streamed_layers
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.units import GiB
from specexec.model import attention
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Travel
from specexec.model.tree_lm import Rows, TreeLM
from tests.simulated.device import DEVICE, Simulator
from tests.tiny import tiny

PRODUCTS = ("aten.mm.", "aten.addmm.", "aten._grouped_mm.")
KINDS = ("products", "unpack", "attention", "other")
PROMPT = 32


class Launches:
    """What was launched inside of the layers of a model, by kind."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.by_kind: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    @contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        """What is launched meanwhile is of this kind, unless it is a product."""
        before = self._simulator.launches.copy()
        own = sum(self.by_kind.values())
        yield
        new = self._simulator.launches - before
        products = 0 if kind in ("attention", "unpack") else sum(new[name] for name in new if name.startswith(PRODUCTS))
        inner = sum(self.by_kind.values()) - own
        self.by_kind["products"] += products
        self.by_kind[kind] += new.total() - products - inner
        if kind == "other":
            self.names.update(new)


def counted(folder: Path, nodes: int, tier: Offload, travels: bool) -> tuple[Launches, int, Counter[str], int]:
    """One sweep over a tree of so many nodes below a text: launches in layers, layers, waits, launches in all."""
    with ExitStack() as undo:
        simulator = undo.enter_context(Simulator(switches=0))
        model = offload.load(folder, tier, str(DEVICE), "f32")
        undo.callback(offload.stream_of(model).close)
        layers = streamed_layers(model)
        carried = frozenset(range(len(layers)) if travels else ())
        lm = TreeLM(model, travel=Travel(carried, offload.carrier_for(DEVICE)) if travels else None)
        undo.callback(lm.close)
        cache, launches = KVCache(), Launches(simulator)
        lm.forward([Rows.text(cache, [*range(PROMPT)])])
        cache.commit(range(PROMPT))
        forward, attend = type(layers[0]).forward, attention.attend_block
        dense = Block.dense

        def layer(*args: object, **more: object) -> object:
            with launches.inside("other"):
                return forward(*args, **more)  # type: ignore[arg-type]

        def attending(*args: object, **more: object) -> object:
            with launches.inside("attention"):
                return attend(*args, **more)  # type: ignore[arg-type]

        def unpacking(*args: object, **more: object) -> object:
            with launches.inside("unpack"):
                return dense(*args, **more)  # type: ignore[arg-type]

        undo.enter_context(patch.object(type(layers[0]), "forward", layer))
        undo.enter_context(patch.object(Block, "dense", unpacking))
        for module in (attention, sys.modules["specexec.model.joint_attention"]):
            if hasattr(module, "attend_block"):
                undo.enter_context(patch.object(module, "attend_block", attending))
        simulator.waits.clear()
        before = simulator.launches.total()
        lm.forward([Rows(cache, [1] * nodes, [-1] + [0] * (nodes - 1))])
        whole = simulator.launches.total() - before
        waits = simulator.waits.copy()
        return launches, len(layers), waits, whole


@click.command()
@click.option("--nodes", default="1,64,1024", show_default=True, help="Comma list of rows of a sweep.")
@click.option("--family", default="llama", show_default=True, help="One of tests/tiny.py.")
@click.option("--names", is_flag=True, help="Which operations those of a layer are, in the largest sweep.")
def main(nodes: str, family: str, names: bool) -> None:
    """Count launches."""
    torch.set_num_threads(1)

    def free(device: str, *_: object) -> Free:
        return Free(8 * GiB, None if device == "cpu" else 8 * GiB)

    with TemporaryDirectory() as scratch, patch.object(load, "free_memory", free):
        dense, few = Path(scratch) / "dense", Path(scratch) / "nf4"
        tiny(family, dense, num_hidden_layers=3)
        pack(plan(offload.open_folder(dense), "nf4"), few)
        click.echo(f"| {family} | rows | {' | '.join(KINDS)} | a layer | a sweep | waits |")
        click.echo(f"|---|---:|{'---:|' * (len(KINDS) + 3)}")
        last = None
        cases: list[tuple[str, Path, Offload, bool]] = [
            ("dense, resident (a drafter)", dense, "none", False),
            ("dense, from RAM", dense, "ram", False),
            ("4 bits, from RAM", few, "ram", False),
            ("4 bits, keys and values in RAM too", few, "ram", True),
        ]
        for title, folder, tier, travels in cases:
            for rows in map(int, nodes.split(",")):
                found, layers, waits, whole = counted(folder, rows, tier, travels)
                each = [found.by_kind[kind] / layers for kind in KINDS]
                cells = [f"{value:.1f}".removesuffix(".0") for value in (*each, sum(each))]
                click.echo(f"| {title} | {rows} | {' | '.join(cells)} | {whole} | {waits.total()} |")
                last = found, layers, waits
        if last and names:
            for name, count in last[0].names.most_common():
                click.echo(f"  {count / last[1]:5.1f} {name}")
        for place, count in last[2].most_common() if last else ():
            click.echo(f"  waits {count} × {place}")


if __name__ == "__main__":
    main()
