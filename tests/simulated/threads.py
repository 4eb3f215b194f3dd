"""Threads that take turns as a seed says: one runs at a time, and where it may be another's turn chance decides.

Locks, conditions, events and futures are Python's own on top of the locks here, which tell clocks as well who heard of
whom. A program that cannot go on is an error instead of a test that hangs.
"""

from __future__ import annotations

import _thread
import concurrent.futures.thread
import queue
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from tests.simulated.clocks import Actor, Clock

ALONE = 200
"""So often may timeouts alone wake threads up before the program counts as stuck."""

SWITCHES = 0.4
"""How often it is another thread's turn where locks are released and streams are made to wait."""

PATIENCE_s = 60.0
REAL = {name: getattr(threading, name) for name in ("Lock", "RLock", "Thread", "current_thread")}


class Stuck(BaseException):
    """No thread can go on."""


class Turn:
    """What a thread is to the others."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor
        self.baton = _thread.allocate_lock()
        self.baton.acquire()
        self.until: Callable[[], bool] | None = None
        self.timed = self.woken = self.over = False
        self.thread: SimThread | None = None

    @property
    def ready(self) -> bool:
        return not self.over and (self.until is None or self.until())


class Threads:
    """All threads of one run. `around` is entered by each of them."""

    def __init__(self, seed: int, around: Callable[[], AbstractContextManager[object]]) -> None:
        self.chance = random.Random(seed)
        self.around = around
        self.actors: list[Actor] = []
        self.failures: list[BaseException] = []
        self.stuck = False
        self._timeouts = 0
        self._own = threading.local()
        self.turns = [Turn(self.actor("main"))]
        self._own.turn = self.turns[0]

    def actor(self, name: str) -> Actor:
        """One more thread or stream."""
        self.actors.append(Actor(len(self.actors), f"{name} {len(self.actors)}"))
        self.actors[-1].tick()
        return self.actors[-1]

    @property
    def turn(self) -> Turn:
        """The calling thread's."""
        found: Turn = self._own.turn
        return found

    @property
    def mine(self) -> bool:
        """Is the calling thread one of this run? Libraries may have others."""
        return hasattr(self._own, "turn")

    def maybe_switch(self, share: float = SWITCHES) -> None:
        """Here another thread may be next."""
        if self.chance.random() < share:
            me = self.turn
            me.until = None
            self._pass(me)

    def block(self, until: Callable[[], bool], timed: bool = False) -> bool:
        """Wait; False if nothing but the end of the wait could go on."""
        me = self.turn
        me.until, me.timed, me.woken = until, timed, False
        self._pass(me)
        me.until = None
        return not me.woken

    def finish(self) -> None:
        """Until every other thread has ended."""
        me = self.turn
        self.block(lambda: all(turn.over for turn in self.turns if turn is not me))
        if self.failures:
            raise self.failures[0]

    def _pass(self, me: Turn) -> None:
        if self.stuck:
            raise Stuck
        chosen = self._next()
        if chosen is me:
            return
        chosen.baton.release()
        if me.over:
            return
        if not me.baton.acquire(timeout=PATIENCE_s):
            self.stuck = True
        if self.stuck:
            raise Stuck(f"{me.actor.name} waits for ever")

    def _next(self) -> Turn:
        if ready := [turn for turn in self.turns if turn.ready]:
            self._timeouts = 0
            return self.chance.choice(ready) if len(ready) > 1 else ready[0]
        timed = [turn for turn in self.turns if turn.timed and not turn.over]
        self._timeouts += 1
        if not timed or self._timeouts > ALONE:
            self.stuck = True
            for turn in self.turns:
                turn.baton.release()
            raise Stuck(", ".join(turn.actor.name for turn in self.turns if not turn.over))
        chosen = self.chance.choice(timed)
        chosen.woken = True
        return chosen

    def run(self, turn: Turn, target: Callable[[], object]) -> None:
        """The life of a thread."""
        turn.baton.acquire()
        self._own.turn = turn
        try:
            with self.around():
                target()
        except Stuck:
            pass
        except BaseException as error:
            self.failures.append(error)
        finally:
            turn.over = True
            if not self.stuck:
                self._pass(turn)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """What the program takes from Python's threading comes from here meanwhile."""
        made = {
            "Lock": lambda: SimLock(self) if self.mine else REAL["Lock"](),
            "RLock": lambda: SimRLock(self) if self.mine else REAL["RLock"](),
            "Thread": self._thread,
        }
        with ExitStack() as undo:
            for name, one in (*made.items(), ("_allocate_lock", made["Lock"]), ("current_thread", self._current)):
                undo.enter_context(patch.object(threading, name, one))
            undo.enter_context(patch.object(concurrent.futures.thread, "_global_shutdown_lock", SimLock(self)))
            undo.enter_context(patch.object(queue, "SimpleQueue", _Queue))
            for module, name, kind in _taken():
                undo.enter_context(patch.object(module, name, made[kind]))
            yield

    def _thread(self, **how: Any) -> SimThread:
        return SimThread(self, **how)

    def _current(self) -> object:
        return (self.turn.thread if self.mine else None) or REAL["current_thread"]()


@cache
def _taken() -> list[tuple[object, str, str]]:
    """Where our modules hold locks and threads under names of their own."""
    return [  # found once: looking takes longer than a run
        (module, name, kind)
        for module in [*sys.modules.values()]
        if getattr(module, "__name__", "").partition(".")[0] in ("offload", "specexec")
        for name, value in [*vars(module).items()]
        for kind, real in REAL.items()
        if value is real
    ]


class SimThread:
    """As threading.Thread, as far as the program uses it."""

    def __init__(
        self,
        threads: Threads,
        target: Callable[..., object],
        name: str | None = None,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        daemon: bool | None = None,
    ) -> None:
        self.name, self.daemon = name or "thread", daemon
        self._threads, self._turn = threads, Turn(threads.actor(self.name))
        self._turn.thread = self
        self._target: Callable[[], object] = lambda: target(*args, **(kwargs or {}))

    def start(self) -> None:
        """Let it run from now on, when it is its turn."""
        threads, turn = self._threads, self._turn
        turn.actor.hear(threads.turn.actor.tell())
        threads.turns.append(turn)
        _thread.start_new_thread(threads.run, (turn, self._target))
        threads.maybe_switch()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        if self._threads.block(lambda: self._turn.over, timed=timeout is not None):
            self._threads.turn.actor.hear(self._turn.actor.clock)

    def is_alive(self) -> bool:
        """Has it not ended yet?"""
        return not self._turn.over


class SimLock:
    """As threading.Lock: who acquires it has heard of what happened before it was released."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._owner: Turn | None = None
        self._clock: Clock = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it, or wait until it is free."""
        if self._owner is not None and (
            not blocking or not self._threads.block(lambda: self._owner is None, timed=timeout >= 0)
        ):
            return False
        self._owner = self._threads.turn
        self._owner.actor.hear(self._clock)
        return True

    def release(self) -> None:
        """Let others take it; anybody may."""
        assert self._owner is not None, "released twice"
        self._owner = None
        self._clock = self._threads.turn.actor.tell()
        self._threads.maybe_switch()

    def locked(self) -> bool:
        """Is it taken?"""
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class SimRLock(SimLock):
    """As threading.RLock."""

    _depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it, once more if it is held already."""
        if self._owner is not self._threads.turn and not super().acquire(blocking, timeout):
            return False
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back as often as it was taken."""
        self._depth -= 1
        if not self._depth:
            super().release()

    def _is_owned(self) -> bool:
        return self._owner is self._threads.turn

    def _release_save(self) -> int:
        depth, self._depth = self._depth, 0
        super().release()
        return depth

    def _acquire_restore(self, depth: int) -> None:
        super().acquire()
        self._depth = depth


class _Queue:
    """As queue.SimpleQueue, with a condition that can be seen."""

    def __init__(self) -> None:
        self._items: deque[object] = deque()
        self._changed = threading.Condition()

    def put(self, item: object) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify()

    def get(self, block: bool = True) -> object:
        with self._changed:
            while not self._items:
                if not block:
                    raise queue.Empty
                self._changed.wait()
            return self._items.popleft()

    def get_nowait(self) -> object:
        return self.get(block=False)
