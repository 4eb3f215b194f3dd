"""A cluster of engines writes what one engine writes, also when one of them is killed in mid-run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest

from cli.batch.cluster import Cluster, ClusterBatch
from cli.batch.worker import Worker
from specexec.sampling import SamplingParams
from specexec.stats import Completion
from specexec.work import Failure, Request, Result
from tests import fake_engine
from tests.fake_engine import FakeEngine


def requests(count: int) -> list[Request]:
    return [
        Request(index, f"question {index} " + "and more " * (index % 5), SamplingParams()) for index in range(count)
    ]


def texts(results: list[Result]) -> dict[int, str]:
    found = {result.index: result.text for result in results if isinstance(result, Completion)}
    assert len(found) == len([result for result in results if isinstance(result, Completion)])
    return found


def test_a_worker_takes_requests_while_it_writes_others() -> None:
    worker = Worker(partial(FakeEngine, sweep_s=0.001), 3)
    wanted, results = requests(9), []
    for start in range(0, 9, 3):
        results += worker.work(wanted[start : start + 3]).results
    while (report := worker.work([])).partial or report.results:
        results += report.results
    assert texts(results) == {one.index: f"echo: {one.prompt}" for one in wanted}


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    ray.cloudpickle.register_pickle_by_value(fake_engine)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, configure_logging=False)
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("ray")
def test_the_answers_of_a_killed_worker_go_on_elsewhere(ray: object) -> None:
    wanted = [*requests(40), Request(40, "", SamplingParams())]
    batch = ClusterBatch(Cluster(partial(FakeEngine, sweep_s=0.05), 2, 0.0), iter(wanted), 4)
    pids = ray.get([place.actor.pid.remote() for place in batch._places])  # type: ignore[attr-defined]
    results: list[Result] = []
    killed = 0
    until_s = time.monotonic() + 200
    while not batch.done and time.monotonic() < until_s:
        results += batch.sweep()
        if results and not killed:
            os.kill(pids[0], signal.SIGKILL)
            killed += 1
    batch.close()
    assert killed
    assert texts(results) == {one.index: f"echo: {one.prompt}" for one in wanted if one.prompt}
    assert [result.index for result in results if isinstance(result, Failure)] == [40]
