"""A cluster of engines writes what one engine writes, also when one of them is killed in mid-run."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import click
import pytest

from cli.app import main
from cli.batch.cluster import running_cluster
from cli.batch.worker import ClusterWorker
from cli.shared.options import EngineOptions
from specexec.engine.request_types import Failure, Request, Result
from specexec.sampling.params import SamplingParams
from specexec.stats import Completion
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
    worker = ClusterWorker(partial(FakeEngine, sweep_s=0.001), 3)
    wanted, results = requests(9), []
    for start in range(0, 9, 3):
        results += worker.work(wanted[start : start + 3]).results
    while (report := worker.work([])).partial or report.results:
        results += report.results
    assert texts(results) == {one.index: f"echo: {one.prompt}" for one in wanted}


def opened(_options: EngineOptions) -> FakeEngine:
    """What a worker gets for an engine."""
    return FakeEngine(sweep_s=0.05)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Ray on two cores, however many there are."""
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    for module in (fake_engine, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2))
    assert isinstance(ray, ModuleType)
    return ray


def test_a_cluster_that_is_not_there_is_said(
    ray: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to.")

    monkeypatch.setattr(ray, "init", missing)
    output = str(tmp_path / "out.jsonl")
    assert main(["generate", "-p", "hi", "-o", output, "--engine", "ray", "--ray-address", "auto"]) == 6
    said = capfd.readouterr().err
    assert "reached at auto: Could not find any running Ray instance.\n  Try: ray start --head" in said


@pytest.mark.parametrize("form", ["{}:{}", "ray://{}:{}"])
def test_ray_is_not_sent_to_an_address_where_nothing_listens(
    form: str, ray: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def init(address: str, **_: object) -> None:
        asked.append(address)
        raise ConnectionError("That is no Ray.")

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(*server.getsockname())
        run = ["generate", "-p", "hi", "-o", str(tmp_path / "out"), "--engine", "ray", "--ray-address", address]
        assert main(run) == 6
    assert asked == [address]
    assert main([*run, "--overwrite"]) == 6
    assert asked == [address], "Ray would wait for minutes"
    said = capfd.readouterr().err
    assert f"reached at {address}: That is no Ray.\n  Try: ray start --head" in said
    assert f"reached at {address}: Connection refused.\n  Try: ray start --head" in said


@pytest.mark.filterwarnings("ignore")
def test_the_answers_of_a_killed_worker_go_on_elsewhere(ray: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = [*requests(40), Request(40, "", SamplingParams())]
    opener = partial(FakeEngine, sweep_s=0.05)
    with pytest.raises(click.UsageError, match="the cluster has 2 cores"), running_cluster(opener, None, 3):
        pass
    with running_cluster(opener, None, 2) as cluster:
        batch = cluster.batch(iter(wanted), 4)
        pids = ray.get([place.actor.pid.remote() for place in batch._places])
        results: list[Result] = batch.sweep()
        assert min(len(place.requests) for place in batch._places) > 41 // 4, "all have about as much to do"
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


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_writes_the_file_of_one_engine_and_one_engine_can_go_on_with_it(
    ray: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, undisturbed = (tmp_path / name for name in ("in.txt", "out.jsonl", "whole.jsonl"))
    source.write_text("".join(f"question {number} {'and more ' * (number % 5)}\n" for number in range(40)))
    run = ["generate", str(source), "--split", "lines", "--seed", "1"]
    monkeypatch.setattr("cli.engine.open.open_engine", lambda options, **_: FakeEngine())
    assert main([*run, "-o", str(undisturbed)]) == 0

    def interrupt() -> None:
        while not output.exists() or not output.stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    monkeypatch.setattr("cli.batch.command.open_engine", opened)
    assert main([*run, "-o", str(output), "--engine", "ray", "--workers", "2"]) == 130
    sender.join()
    assert 0 < len(essence(output)) < 40
    assert json.loads(Path(f"{output}.partial.json").read_text())["items"], "what the workers have begun is kept"
    assert main([*run, "-o", str(output), "--resume"]) == 0
    assert essence(output) == essence(undisturbed)


def essence(path: Path) -> list[tuple[object, ...]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((one["id"], one["seed"], one["text"], one["finish_reason"], one["token_ids"]) for one in records)
