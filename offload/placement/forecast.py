"""How long a sweep will take, from where the layers live and how fast this machine is. Arithmetic only, no torch.

Disk, link and arithmetic work at the same time, so a sweep takes as long as the slowest of them. Where a CPU does all
of it, each is slower while another works.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from offload.checkpoint.routing import DENSE, Routing
from offload.machine.speeds import ALONE, Arithmetic, ASSUMED_DISK_Bps, ASSUMED_LINK_Bps, Contention, Disk, Speeds
from offload.placement.placement import Placement

SCHEMES = ("nf4", "int8", "int4", "mxfp4")
# Assumed where nothing was measured: a small CPU, a small GPU. They are labelled as such.
ASSUMED_CPU = Arithmetic(flops=150e9, weights_Bps=8e9)
ASSUMED_INTEGERS = Arithmetic(flops=150e9, weights_Bps=4e9)
ASSUMED_GPU = Arithmetic(flops=15e12, weights_Bps=300e9)
# Codes to weights, in bytes of weights: bitsandbytes on two cores here; half of what a small GPU's memory gives.
UNPACK_CPU_Bps = 1.5e9
UNPACK_GPU_Bps = 150e9


@dataclass(frozen=True)
class Ceilings:
    """Speeds that a sweep cannot beat, and which of them are assumed, not measured."""

    disk_Bps: float
    link_Bps: float
    arithmetic: Arithmetic
    unpack_Bps: Mapping[str, float]
    """By scheme."""
    assumed: tuple[str, ...] = ()
    contention: Contention = ALONE
    integers: Arithmetic = ASSUMED_INTEGERS
    """With weights in int8, as they are stored."""


@dataclass(frozen=True)
class Work:
    """What one sweep multiplies: weights in the compute dtype, some of which are unpacked first, and integers."""

    weights_B: int
    item_B: int
    unpacked_B: Mapping[str, int] = field(default_factory=dict)
    """By scheme."""
    experts_B: int = 0
    """Those of `weights_B` that belong to experts."""
    routing: Routing = DENSE
    experts_share: float = 0.0
    """Of the bytes that travel."""
    unpacked_experts_B: Mapping[str, int] = field(default_factory=dict)
    """Those of `unpacked_B` that belong to experts, by scheme."""
    whole_numbers: int = 0
    """Weights that are multiplied in integers, as they are stored: none of them is among `weights_B`."""

    def unpacked(self, rows: int) -> dict[str, float]:
        """Bytes that such a sweep unpacks, by scheme: of the experts only those that are visited."""
        missed = 1 - self.visited(rows)
        return {key: total - missed * self.unpacked_experts_B.get(key, 0) for key, total in self.unpacked_B.items()}

    def visited(self, rows: int) -> float:
        """The part of the experts that a sweep over so many rows is expected to visit."""
        return float(self.routing.touched(rows)) / self.routing.experts

    def share(self, rows: int) -> float:
        """The part of the bytes that such a sweep brings: fewer rows visit fewer experts."""
        return 1 - self.experts_share * (1 - float(self.routing.share(rows)))


@dataclass(frozen=True)
class Forecast:
    """Seconds of a sweep for each of the three that work at the same time, with what they take from each other.

    While experts are fetched on demand, which takes `fetch_s` of disk or link, nothing computes.
    """

    disk_s: float
    link_s: float
    compute_s: float
    fetch_s: float = 0.0

    @property
    def sweep_s(self) -> float:
        """The slowest decides."""
        return max(self.disk_s, self.link_s, self.compute_s + self.fetch_s)

    @property
    def bound(self) -> str:
        """Its name."""
        seconds = {"disk": self.disk_s, "link": self.link_s, "compute": self.compute_s}
        return max(seconds, key=seconds.__getitem__)


def ceilings(speeds: Speeds, disk: str, device: str, dtype: str, compute: str = "float") -> Ceilings:
    """What was measured for this disk, device (`cpu` or `cuda`), dtype and way to compute; assumptions for the rest."""
    measured_disk: Disk | None = speeds.disks.get(disk)
    arithmetic = speeds.arithmetic.get(f"{device}/{dtype}")
    integers = speeds.arithmetic.get(f"{device}/int8")
    on_gpu = device != "cpu"
    unpack_Bps = {scheme: speeds.unpack_Bps.get(f"{device}/{scheme}") for scheme in SCHEMES}
    missing = [
        ("disk", measured_disk is None),
        ("link", on_gpu and not speeds.link_Bps),
        ("compute", not arithmetic),
        ("unpacking", not all(unpack_Bps.values())),
        ("integers", compute == "int8" and not integers),
    ]
    return Ceilings(
        measured_disk.Bps if measured_disk else ASSUMED_DISK_Bps,
        speeds.link_Bps or ASSUMED_LINK_Bps,
        arithmetic or (ASSUMED_GPU if on_gpu else ASSUMED_CPU),
        {scheme: Bps or (UNPACK_GPU_Bps if on_gpu else UNPACK_CPU_Bps) for scheme, Bps in unpack_Bps.items()},
        tuple(name for name, is_missing in missing if is_missing),
        measured_disk.contention if measured_disk and not on_gpu else ALONE,
        integers or ASSUMED_INTEGERS,
    )


@dataclass(frozen=True)
class Moved:
    """Bytes that a sweep over `rows` is expected to bring; keys and values of a full context cross the link too."""

    rows: int
    disk_B: int
    link_B: int


def moved(placement: Placement, work: Work, rows: int) -> Moved:
    """Fewer rows visit fewer experts; without experts every sweep brings the same."""
    weights_B = placement.link_B - placement.cache_link_B
    share = work.share(rows)
    disk_B = round(share * placement.disk_B) + placement.cache_disk_B
    return Moved(rows, disk_B, round(share * weights_B) + placement.cache_link_B)


def forecast(placement: Placement, work: Work, ceilings: Ceilings, rows: int) -> Forecast:
    """A sweep over `rows` tokens in the steady state, when the first layers were read ahead."""
    unpack_s = sum(nbytes / ceilings.unpack_Bps[scheme] for scheme, nbytes in work.unpacked(rows).items())
    weights_B = placement.link_B - placement.cache_link_B
    fetched = work.experts_share * work.visited(rows) if work.routing.on_demand(rows) else 0.0
    now = moved(placement, work, rows)
    disk_s, compute_s = now.disk_B / ceilings.disk_Bps, _multiply_s(work, ceilings.arithmetic, rows) + unpack_s
    compute_s += ceilings.integers.seconds(work.whole_numbers, 1, rows)
    left = ceilings.contention
    return Forecast(
        # The longer of the two goes on alone, with the part of its work that contention left undone.
        disk_s + (1 - left.disk) * compute_s / left.compute if disk_s else 0.0,
        now.link_B / ceilings.link_Bps,
        compute_s + (1 - left.compute) * disk_s / left.disk,
        fetched * max(placement.disk_B / ceilings.disk_Bps, weights_B / ceilings.link_Bps),
    )


def _multiply_s(work: Work, arithmetic: Arithmetic, rows: int) -> float:
    """All rows meet the weights they share; each expert that is visited meets its part of them."""
    routing, shared, visited = work.routing, work.weights_B - work.experts_B, work.experts_B * work.visited(rows)
    return arithmetic.seconds(shared / work.item_B, work.item_B, rows) + arithmetic.seconds(
        visited / work.item_B, work.item_B, rows * routing.chosen / float(routing.touched(rows))
    )
