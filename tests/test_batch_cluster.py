"""A cluster of engines writes what one engine writes, also when one of them is killed in mid-run."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from types import ModuleType

import click
import pytest

from cli.batch.cluster import running_cluster
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


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Ray on two cores, however many there are."""
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    ray.cloudpickle.register_pickle_by_value(fake_engine)
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2))
    assert isinstance(ray, ModuleType)
    return ray


@pytest.mark.filterwarnings("ignore")
def test_the_answers_of_a_killed_worker_go_on_elsewhere(ray: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = [*requests(40), Request(40, "", SamplingParams())]
    opener = partial(FakeEngine, sweep_s=0.05)
    with pytest.raises(click.UsageError, match="the cluster has 2 cores"), running_cluster(opener, None, 3):
        pass
    with running_cluster(opener, None, 2) as cluster:
        batch = cluster.batch(iter(wanted), 4)
        pids = ray.get([place.actor.pid.remote() for place in batch._places])
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
    assert capfd.readouterr().out == "", "stdout is for answers"
