"""Many engines over a Ray cluster that look like one: requests go to free workers, those of a failed one to another.

Ray core actors, one engine each. A worker reports every second how far its answers are, so that another one goes on
from there; the texts do not depend on who writes them.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import click

from cli.batch.refusals import ClusterLost
from cli.batch.worker import BatchEngine, ClusterWorker, Report
from cli.shared.errors import MissingExtra
from specexec.engine.request_types import Partial, Request, Result
from specexec.stats import Progress

log = logging.getLogger(__name__)

ASSIGNED = 32  # requests that a worker holds at most, so that the last ones are spread over all
KNOCK_S = 5.0  # for an address to answer
MOST_DEATHS = 3  # of one worker, before its place is given up


@dataclass
class _Place:
    """Where a worker lives, what it is asked to do, and what it said last. Ray's own types are not typed."""

    actor: Any
    call: Any = None
    requests: dict[int, Request] = field(default_factory=dict)
    fresh: list[Request] = field(default_factory=list)
    deaths: int = 0


class Cluster:
    """A run's engine that is many. `opener` opens one where it is called; it travels to the workers."""

    def __init__(self, opener: Callable[[], BatchEngine], workers: int, gpus: float) -> None:
        self._opener = opener
        self._gpus = gpus
        self.size = workers
        """How many workers there shall be."""
        self._stopped = False
        self.sweeps = self.bytes_read = 0

    def batch(self, requests: Iterator[Request], parallel: int | Literal["auto"]) -> ClusterBatch:
        """Start the workers and give the requests out as they become free."""
        return ClusterBatch(self, requests, parallel)

    def progress(self) -> Progress:
        return Progress(0, 0, self.sweeps, self.bytes_read)

    def stop(self) -> None:
        """End the batch after the current reports; what they say is kept. Safe in a signal handler."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        return self._stopped

    def start_worker(self, parallel: int | Literal["auto"]) -> Any:
        """A worker somewhere in the cluster, spread out over its nodes."""
        import ray

        kind = ray.remote(num_cpus=1, num_gpus=self._gpus, scheduling_strategy="SPREAD")(ClusterWorker)
        return kind.remote(self._opener, parallel)


class ClusterBatch:
    """The same promises as one engine's batch (specexec/engine/batch.py); a `sweep` is a round of reports."""

    def __init__(self, cluster: Cluster, requests: Iterator[Request], parallel: int | Literal["auto"]) -> None:
        self.done = False
        self.sweeps = 0
        self._cluster = cluster
        self._requests = requests
        self._parallel = parallel
        self._again: deque[Request] = deque()
        self._places = [_Place(cluster.start_worker(parallel)) for _ in range(cluster.size)]

    @property
    def partial(self) -> list[Partial]:
        """How far the unfinished answers are, as far as was reported."""
        held = [request for place in self._places for request in place.requests.values()]
        return [Partial(request.index, request.written) for request in [*held, *self._again]]

    def sweep(self) -> list[Result]:
        """Give out what there is room for, and wait for the next report."""
        import ray

        self._deal([place for place in self._places if place.call is None])
        calls = [place.call for place in self._places if place.call is not None]
        if not calls or self._cluster.stopped:
            self.done = True
            return []
        ready, _ = ray.wait(calls, num_returns=1, timeout=1.0)
        return [result for place in self._places if place.call in ready for result in self._hear(place)]

    def close(self) -> None:
        """Let the workers go."""
        import ray

        self.done = True
        for place in self._places:
            ray.kill(place.actor)
        self._places.clear()

    def _deal(self, free: list[_Place]) -> None:
        """Give requests out in turns, so that few are shared by all, and let those work who have anything to do."""
        for _ in range(ASSIGNED):
            for place in free:
                if len(place.requests) < ASSIGNED and (request := self._next()) is not None:
                    place.requests[request.index] = request
                    place.fresh.append(request)
        for place in free:
            if place.requests:
                place.call, place.fresh = place.actor.work.remote(place.fresh), []

    def _next(self) -> Request | None:
        return self._again.popleft() if self._again else next(self._requests, None)

    def _hear(self, place: _Place) -> list[Result]:
        """A report, or the news that there will be none."""
        import ray
        from ray.exceptions import RayActorError

        call, place.call = place.call, None
        try:
            report: Report = ray.get(call)
        except RayActorError as death:
            self._bury(place, death)
            return []
        self.sweeps += report.sweeps
        self._cluster.sweeps += report.sweeps
        self._cluster.bytes_read += report.bytes_read
        for partial in report.partial:
            request = place.requests[partial.index]
            if request.sampling.logprobs is None:  # tokens that are not computed again have none
                place.requests[partial.index] = replace(request, written=partial.tokens)
        for result in report.results:
            del place.requests[result.index]
        return report.results

    def _bury(self, place: _Place, death: Exception) -> None:
        """Its requests go to others, with what they have already; a new worker takes its place."""
        place.deaths += 1
        self._again.extend(place.requests.values())
        said = str(death).strip().splitlines()
        log.warning("a worker has died; its %d answers continue elsewhere: %s", len(place.requests), said[0])
        place.requests.clear()
        if place.deaths < MOST_DEATHS:
            place.actor = self._cluster.start_worker(self._parallel)
            return
        self._places.remove(place)
        if not self._places:
            raise ClusterLost(
                f"every worker has died {MOST_DEATHS} times; the last one said: {said[-1]}",
                hint="look at the workers' machines, then the same command with --resume.",
            )


@contextmanager
def running_cluster(
    opener: Callable[[], BatchEngine], address: str | None, workers: int | Literal["auto"]
) -> Iterator[Cluster]:
    """A cluster for the length of the block: the one at `address`, or a local one for this run alone.

    Automatic: one worker for each GPU, or where there is none, for each machine.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtra(
            "--engine ray needs Ray, which is not installed.", hint="pip install 'specexec[ray]'"
        ) from None
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as problem:
        where = "started here" if address is None else f"reached at {address}"
        raise ClusterLost(
            f"no Ray cluster could be {where}: {str(problem).strip().partition('. ')[0].rstrip('.')}.",
            hint="ray start --head, or leave out --ray-address.",
        ) from problem
    # What befalls a worker Ray would print to stdout, among the answers; `_bury` says it on stderr.
    ray._private.worker._worker_logs_enabled = False
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = (gpus or len(ray.nodes())) if workers == "auto" else workers
        if count > (cores := int(ray.cluster_resources().get("CPU", 0))):  # some would wait for one for ever
            raise click.UsageError(f"--workers {count}: the cluster has {cores} cores; ask for fewer.")
        yield Cluster(opener, count, 1.0 if gpus >= count else 0.0)
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Raises ConnectionError where nothing listens at `host:port` or `ray://host:port`; Ray itself asks for minutes."""
    parts = urlsplit(address if address and "://" in address else f"//{address or ''}")
    if parts.scheme not in ("", "ray") or parts.hostname is None or parts.port is None:
        return  # auto, local: Ray finds or starts one
    try:
        socket.create_connection((parts.hostname, parts.port), KNOCK_S).close()
    except OSError as problem:
        raise ConnectionError(problem.strerror or f"no answer in {KNOCK_S:g} seconds") from problem
