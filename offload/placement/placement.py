"""What lives where and how much memory that takes, in numbers alone. Knows no torch, no file and no machine.

A resident model is a placement with every layer on the device; on the CPU the device is RAM. Beside a GPU, token ids
are looked up in RAM unless the embeddings are the head too, and keys and values of any layer may live in RAM, or on
disk: they travel with their layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from offload.units import size

Offload = Literal["auto", "none", "ram", "disk"]
KVHome = Literal["ram", "disk", "auto"]  # the slowest place for keys and values; auto: disk where nothing else fits
Tier = Literal["device", "ram", "disk"]

# Two buffers overlap reading with computing; a third absorbs layers that take unequally long.
RING = 3


@dataclass(frozen=True)
class Need:
    """Bytes a model takes: its layers in memory (compute dtype) and on disk, and everything beside them."""

    layers_B: tuple[int, ...]
    read_B: tuple[int, ...]
    embeddings_B: int
    """The matrix in which token ids are looked up."""
    norms_B: int
    """Norms, and whatever else is neither a layer nor one of the two large matrices."""
    head_B: int
    """Zero where the embeddings are the head too."""
    cache_B: int
    ctx: int
    cache_widths: tuple[int, ...] = ()
    """What the layers keep of a token, beside one another: the same of each unless it is said."""
    cache_stays: frozenset[int] = frozenset()
    """Layers whose keys and values others attend to: they never travel."""
    lookups_B: int = 0
    """Rows for each layer that are looked up by token id: in RAM, whatever computes."""
    guesses_B: int = 0
    """Keys and values beyond those of the text."""
    states_B: Mapping[int, int] = field(default_factory=dict)
    """What recurrent layers keep of a text and its guesses, by number. In RAM it travels as keys and values do."""
    cache_moves: bool = False
    """Can keys and values live in RAM and travel with their layer?"""
    scratch_B: int = 0
    dense_B: int = 0
    """One layer dequantised; zero where weights travel as they compute."""
    passing_B: int = 0
    """Values between codes and a dequantised layer, where a GPU computes; a CPU's caches hold theirs."""
    head_rows_B: int = 0
    """Rows of a head in four bits while they are multiplied with; zero where the head computes as it is kept."""
    head_passing_B: int = 0
    """A head that is quantised on its way into memory, as it is read."""
    beside_B: Mapping[str, int] = field(default_factory=dict)
    """What the caller takes beside the model (drafter, trees, logits), by what it is for."""
    beside_ram_B: Mapping[str, int] = field(default_factory=dict)
    """What of that lies in RAM even while a GPU computes."""

    @property
    def resident_B(self) -> int:
        """All of it in memory, once it has been read."""
        fixed_B = self.embeddings_B + self.lookups_B + self.norms_B + self.head_B + self.head_rows_B + self.dense_B
        beside_B = sum(self.beside_B.values()) + sum(self.beside_ram_B.values())
        return sum(self.layers_B) + fixed_B + self.cache_B + self.guesses_B + sum(self.states_B.values()) + beside_B

    @property
    def caches_B(self) -> tuple[int, ...]:
        """Keys and values of each layer, those of a full context and its guesses."""
        return self.shares_B(self.cache_B + self.guesses_B)

    @property
    def kept_B(self) -> tuple[int, ...]:
        """What of each layer goes to RAM together: keys and values, and states."""
        return tuple(cache_B + self.states_B.get(layer, 0) for layer, cache_B in enumerate(self.caches_B))

    def shares_B(self, whole_B: int) -> tuple[int, ...]:
        """What each layer has of keys and values of all layers, rounded up."""
        layers = len(self.layers_B)
        widths = self.cache_widths if len(self.cache_widths) == layers and any(self.cache_widths) else (1,) * layers
        return tuple(-(-whole_B * width // sum(widths)) for width in widths)

    @property
    def disk_B(self) -> int:
        """What reading every layer from disk reads."""
        return sum(self.read_B)

    @property
    def widest_B(self) -> int:
        """The largest layer, so the size of a buffer."""
        return max(self.layers_B)


@dataclass(frozen=True)
class Placement:
    """Where each layer lives, and how much memory that takes on the host and on the device that computes."""

    tiers: tuple[Tier, ...]
    caches: tuple[Tier, ...]
    """Where keys and values of each layer live: on the device, or all others in RAM, or on disk."""
    ring: int
    need: Need
    on_gpu: bool

    @property
    def offload(self) -> Literal["none", "ram", "disk"]:
        """The slowest tier a layer lives in, by its option's name."""
        return "disk" if "disk" in self.tiers else "ram" if "ram" in self.tiers else "none"

    @property
    def in_place(self) -> frozenset[int]:
        """Layers that compute where they are kept."""
        staying = ("device",) if self.on_gpu else ("device", "ram")
        return frozenset(layer for layer, tier in enumerate(self.tiers) if tier in staying)

    @property
    def ring_B(self) -> int:
        """Bytes of all buffers of the ring, on each side that has one."""
        return self.ring * self.need.widest_B

    @property
    def disk_B(self) -> int:
        """Bytes that one sweep reads from disk."""
        return sum(self._of("disk", self.need.read_B))

    @property
    def stream_B(self) -> int:
        """Bytes that come over the wire in one sweep, from disk or from RAM."""
        return self.disk_B + sum(self._of("ram", self.need.layers_B))

    @property
    def link_B(self) -> int:
        """Bytes that one sweep carries from RAM to the device."""
        if not self.on_gpu:
            return 0
        return sum(self._of("disk", self.need.layers_B)) + self.kept_B("ram") + self.cache_link_B

    @property
    def cache_link_B(self) -> int:
        """What keys and values are of it, once the context is full, and states, which go there and back."""
        if not self.on_gpu:
            return 0
        return sum(self._travelling_B(self.need.caches_B)) + sum(self._moving_states_B)

    @property
    def cache_disk_B(self) -> int:
        """Keys and values on disk: what they take there, and what one sweep reads of them once the context is full."""
        return sum(size_B for size_B, tier in zip(self.need.caches_B, self.caches, strict=True) if tier == "disk")

    @property
    def embeddings_in_ram(self) -> bool:
        """Are token ids looked up in RAM while a GPU computes?"""
        return self.on_gpu and self.need.head_B > 0

    @property
    def host_B(self) -> int:
        """Bytes of RAM that it takes."""
        return sum(self.host_parts_B.values())

    @property
    def device_B(self) -> int | None:
        """Bytes of GPU memory that it takes; None where the CPU computes."""
        return sum(self.device_parts_B.values()) if self.on_gpu else None

    @property
    def host_parts_B(self) -> dict[str, int]:
        """RAM by what it is for."""
        need = self.need
        streamed = {
            "layers in RAM": self.kept_B("ram"),
            "layer buffers": self.ring_B if "disk" in self.tiers else 0,
            "reading": need.scratch_B,
        }
        # Layers come into memory after the rest: until then their place is free.
        later_B = streamed["layers in RAM"] + streamed["layer buffers"]
        if not self.on_gpu:
            kept_B = self.kept_B("device")
            streamed |= {"KV on its way": self._arriving_B}
            on_the_way_B = max(0, need.head_passing_B - later_B - kept_B)
            computing_B = {**self._computing_B, **need.beside_ram_B}
            return _present(
                {"layers that stay": kept_B, **streamed, **computing_B, "weights on their way": on_the_way_B}
            )
        # On their way to the device, weights pass through host memory one block at a time.
        on_the_way_B = max(0, max(need.widest_B, need.head_passing_B or need.head_B or need.embeddings_B) - later_B)
        embeddings_B = need.embeddings_B if self.embeddings_in_ram else 0
        looked_up_B = {"embeddings": embeddings_B, "embeddings of layers": need.lookups_B, **need.beside_ram_B}
        return _present({**streamed, **looked_up_B, **self._cache_B("ram"), "weights on their way": on_the_way_B})

    @property
    def device_parts_B(self) -> dict[str, int]:
        """GPU memory by what it is for; nothing where the CPU computes."""
        if not self.on_gpu:
            return {}
        return _present(
            {
                "layers that stay": self.kept_B("device"),
                "layer buffers": self.ring_B,
                "KV on its way": self._arriving_B,
                **self._computing_B,
            }
        )

    @property
    def _arriving_B(self) -> int:
        """Two layers' keys and values: one attends while the next arrives. Of states also those that leave."""
        rows_B, states_B = sorted(self._travelling_B(self.need.caches_B)), sorted(self._moving_states_B)
        return sum(rows_B[-2:]) + sum(states_B[-3:])

    @property
    def _moving_states_B(self) -> list[int]:
        """States of layers whose keys and values are in RAM. None go to disk: each sweep writes them whole."""
        in_ram = [layer for layer, tier in enumerate(self.caches) if tier == "ram" and self.on_gpu]
        return [self.need.states_B[layer] for layer in in_ram if layer in self.need.states_B]

    @property
    def _computing_B(self) -> dict[str, int]:
        """What lies where the computation is."""
        need = self.need
        return {
            "embeddings": 0 if self.embeddings_in_ram else need.embeddings_B,
            "embeddings of layers": 0 if self.on_gpu else need.lookups_B,
            "norms": need.norms_B,
            "head": need.head_B,
            "rows of the head dequantised": need.head_rows_B,
            **self._cache_B("device"),
            "a layer dequantised": need.dense_B,
            "weights while they are dequantised": need.passing_B if self.on_gpu else 0,
            **need.beside_B,
        }

    def _cache_B(self, tier: Tier) -> dict[str, int]:
        """Keys and values of the layers that keep them there; rounded up where they travel."""
        need = self.need

        def share_B(whole_B: int) -> int:
            away_B = min(whole_B, sum(self._travelling_B(need.shares_B(whole_B))))
            if tier == "device":
                return whole_B - away_B
            return 0 if "disk" in self.caches else away_B

        moving_B = sum(self._moving_states_B)
        return {
            f"KV cache at --ctx {need.ctx}": share_B(need.cache_B),
            "KV of guesses": share_B(need.guesses_B),
            "recurrent states": moving_B if tier == "ram" else sum(need.states_B.values()) - moving_B,
        }

    def _travelling_B(self, sizes_B: Sequence[int]) -> list[int]:
        return [size_B for size_B, tier in zip(sizes_B, self.caches, strict=True) if tier != "device"]

    def kept_B(self, tier: Tier) -> int:
        """Bytes of the layers that live in this tier, as they lie in memory."""
        return sum(self._of(tier, self.need.layers_B))

    def count(self, tier: Tier) -> int:
        """How many layers live there."""
        return self.tiers.count(tier)

    @property
    def summary(self) -> str:
        """One line for people: what streams from where, and what stays."""
        memory = "GPU memory" if self.on_gpu else "RAM"
        travelling = len(self.caches) - self.caches.count("device")
        some = "" if travelling == len(self.caches) else f" of {travelling} layers"
        place, each_B = ("on SSD", self.cache_disk_B) if self.cache_disk_B else ("in RAM", self.cache_link_B)
        kinds = [
            name for name, sizes_B in (("KV", self.need.caches_B), ("states", self._moving_states_B)) if any(sizes_B)
        ]
        caches = f"; {' and '.join(kinds)}{some} {place}, up to {size(each_B)} per sweep" if travelling else ""
        if self.offload == "none":
            return f"all {len(self.tiers)} layers stay in {memory}, {size(self.kept_B('device'))}{caches}"
        groups = [
            (self.count("disk"), "stream from SSD", f"{size(self.disk_B)} per sweep"),
            (self.count("ram"), "stream from RAM", f"{size(self.kept_B('ram'))} per sweep"),
            (self.count("device"), f"stay in {memory}", size(self.kept_B("device"))),
        ]
        parts = [f"{count} {verb}, {amount}" for count, verb, amount in groups if count]
        parts[0] = parts[0].replace(" ", " layers ", 1)
        ring = f", ring {self.ring} × {size(self.need.widest_B)}" if self.ring else ""
        return f"{self.offload}: {'; '.join(parts)}{ring}{caches}"

    def _of(self, tier: Tier, sizes_B: Sequence[int]) -> list[int]:
        return [size_B for size_B, found in zip(sizes_B, self.tiers, strict=True) if found == tier]


def _present(parts_B: Mapping[str, int]) -> dict[str, int]:
    return {name: nbytes for name, nbytes in parts_B.items() if nbytes}
