"""Which accesses to memory are ordered: vector clocks over threads and streams. Knows no torch.

An access happens before another if the second one's actor has heard of it, directly or through others (Lamport 1978;
Mattern 1989; per-access epochs as in FastTrack, Flanagan and Freund 2009). Two accesses to the same bytes, one of them
a write, that are not ordered are a race, whatever their order was in this run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Clock = dict[int, int]
Runs = Iterable[tuple[int, int]]


@dataclass(eq=False)
class Actor:
    """A thread or a stream: does one thing after another."""

    number: int
    name: str
    clock: Clock = field(default_factory=dict)

    @property
    def now(self) -> int:
        """Its own time."""
        return self.clock.get(self.number, 0)

    def tick(self) -> None:
        """What it does from now on is later than what others have heard of."""
        self.clock[self.number] = self.now + 1

    def hear(self, clock: Clock) -> None:
        """All that is in the clock happened before what this actor does from now on."""
        own = self.clock
        for number, time in clock.items():
            if own.get(number, 0) < time:
                own[number] = time

    def tell(self) -> Clock:
        """A clock for others to hear."""
        told = dict(self.clock)
        self.tick()
        return told

    def knows(self, actor: Actor, time: int) -> bool:
        """Did everything that the actor did until then happen before?"""
        return actor is self or self.clock.get(actor.number, 0) >= time


@dataclass(frozen=True)
class Access:
    """One actor's last access of a kind to a run of bytes."""

    time: int
    label: str


class History:
    """Accesses to one piece of memory, as far as they can still be part of a race."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: dict[tuple[int, int, Actor, bool], Access] = {}

    def add(self, actor: Actor, runs: Runs, writes: bool, label: str) -> list[str]:
        """One more access, and the races that it is part of."""
        races = []
        for start, stop in runs:
            for key, access in list(self._found.items()):
                first, last, other, wrote = key
                if first >= stop or last <= start:
                    continue
                if (writes or wrote) and not actor.knows(other, access.time):
                    races.append(
                        f"{self.name}[{max(start, first)}:{min(stop, last)}]: {label} by {actor.name} is not ordered "
                        f"after {access.label} by {other.name}"
                    )
                elif writes and start <= first and last <= stop:
                    del self._found[key]  # what races with it races with this write, too
            self._found[start, stop, actor, writes] = Access(actor.now, label)
        return races

    def unfinished(self, *actors: Actor) -> list[str]:
        """Accesses that none of the actors has heard of."""
        return [
            f"{self.name}[{first}:{last}]: {access.label} by {other.name}"
            for (first, last, other, _), access in self._found.items()
            if not any(actor.knows(other, access.time) for actor in actors)
        ]
