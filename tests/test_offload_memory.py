"""A limit is a limit: streaming stays inside it with the page cache counted, and memory that is refused is an error."""

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

import offload
from offload.checkpoint.block import Block
from offload.checkpoint.headers import open_folder
from offload.errors import NotEnoughRam, NotEnoughVram
from offload.model import load as loading
from offload.packs.pack import pack, plan
from offload.stream.store import Arena
from offload.stream.transfer import DeviceWire
from offload.units import size
from tests.held import open_below, started_since
from tests.test_offload_wire import StandIn
from tests.tiny import logits_of, tiny

CGROUPS = Path("/sys/fs/cgroup/memory")
MiB = 1 << 20
PROMPT = torch.arange(2, 12)[None]
SWEEPS = """
import os, sys
from cli.engine.imports import lean_imports
with lean_imports():
    import torch, offload, offload.model.load
torch.set_num_threads(1)
folder, small, group = sys.argv[1:]
tokens = torch.arange(9)[None]
with torch.no_grad():
    offload.load(small, "disk", ctx=64)(tokens)  # libraries and thread stacks are not what is limited
    open(f"{group}/cgroup.procs", "w").write(str(os.getpid()))
    model = offload.load(folder, "disk", ctx=64)
    for _ in range(3):
        model(tokens)
stream = offload.stream_of(model)
print(stream.placement.host_B, stream.stats().bytes_read)
"""


sys.path.append(str(Path(__file__).parent.parent / "scripts"))
inflate: click.Command = importlib.import_module("inflate").main


@pytest.fixture
def group() -> Iterator[Path]:
    folder = CGROUPS / f"specexec-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error.strerror}")
    yield folder
    folder.rmdir()


@pytest.mark.parametrize("direct", [True, False])
def test_sweeps_stay_inside_a_container_that_holds_a_third_of_the_model(direct: bool, group: Path, deep: Path) -> None:
    weights_B = (deep / "m" / "model.safetensors").stat().st_size
    plan_B = offload.stream_of(offload.load(deep / "m", "disk", ctx=64)).placement.host_B
    limit_B = plan_B + 24 * MiB
    assert weights_B > 2.5 * limit_B
    (group / "memory.limit_in_bytes").write_text(str(limit_B))
    script = SWEEPS if direct else "import os; del os.O_DIRECT; os.O_DIRECT = 0\n" + SWEEPS
    ran = subprocess.run(
        [sys.executable, "-c", script, str(deep / "m"), str(deep / "small"), str(group)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    said_B, read_B = map(int, ran.stdout.split())
    assert said_B == plan_B
    assert read_B > 2.9 * (weights_B - 2 * MiB)
    peak_B = int((group / "memory.max_usage_in_bytes").read_text())
    assert peak_B <= limit_B, size(peak_B)


ULIMITED = """
import resource, sys
from cli.engine.imports import lean_imports
with lean_imports():
    import torch, offload, offload.model.load
from offload.errors import NotEnoughRam
from offload.machine.memory import free_ram
torch.set_num_threads(1)
folder, small, spare_B = *sys.argv[1:3], int(sys.argv[3])
tokens = torch.arange(9)[None]
with torch.no_grad():
    offload.load(small, "disk", ctx=64)(tokens)
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    limit_B = (int(rows["VmData"].split()[0]) << 10) + spare_B
    resource.setrlimit(resource.RLIMIT_DATA, (limit_B, limit_B))
    print(free_ram().free_B)
    try:
        offload.load(folder, "none", ctx=64)
    except NotEnoughRam as refused:
        print(refused)
    model = offload.load(folder, "auto", ctx=64)
    model(tokens)
print(offload.stream_of(model).placement.offload)
"""


def test_a_limit_of_the_shell_is_a_limit_where_there_is_no_container(deep: Path) -> None:
    weights_B = (deep / "m" / "model.safetensors").stat().st_size
    spare_B = weights_B // 2
    ran = subprocess.run(
        [sys.executable, "-c", ULIMITED, str(deep / "m"), str(deep / "small"), str(spare_B)],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    free_B, refusal, placed = ran.stdout.splitlines()[0], ran.stdout.splitlines()[1], ran.stdout.splitlines()[-1]
    assert int(free_B) == pytest.approx(spare_B, rel=0.1)
    assert re.fullmatch(r"--offload none needs .* of RAM, .* are free \(limit: ulimit -d .*\)\.", refusal)
    assert placed == "disk"


def measured(folder: Path, *options: str) -> dict[str, float]:
    """What scripts/measure_memory.py finds: a fresh process answers a prompt that fills the context."""
    home = Path(__file__).parent.parent
    command = [sys.executable, str(home / "scripts" / "measure_memory.py"), str(folder), "--json", *options]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(home)})
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def test_an_answer_takes_what_the_plan_says_inside_a_limit(tmp_path: Path) -> None:
    # Layers of 15 MB, so that the noise of an interpreter is small beside them.
    shape = ["--hidden", "768", "--layers", "6", "--heads", "12", "--kv-heads", "3", "--head-dim", "64", "--ff", "3072"]
    inflate([str(tmp_path / "m"), *shape], standalone_mode=False)
    found = measured(tmp_path / "m", "--ctx", "128", "--budget", "32", "--tokens", "4", "--limit", "900MB")
    assert found["tokens"] == 4
    # What is read into place leaves the counted bounce buffers untouched.
    assert 0.85 * found["plan_B"] < found["peak_B"] < 1.1 * found["plan_B"]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small layers of wide rows: what a sweep takes is more than the weights."""
    folder = tmp_path_factory.mktemp("flat") / "m"
    shape = ["--hidden", "768", "--layers", "5", "--heads", "12", "--kv-heads", "3", "--head-dim", "64", "--ff", "512"]
    inflate([str(folder), *shape], standalone_mode=False)
    return folder


@pytest.mark.parametrize(
    ("texts", "asked"),
    [
        (1, ["--budget", "512"]),
        (16, ["--budget", "64", "--ram", "120MB"]),  # not all of them fit at a time
    ],
)
def test_texts_and_their_guesses_take_no_more_than_was_counted_for_them(
    texts: int, asked: list[str], flat: Path
) -> None:
    drafter = Path(offload.__file__).parent / "demo" / "drafter"
    given = ["--drafter", str(drafter), "--parallel", str(texts), "--ctx", "256", "--tokens", "3", *asked]
    found = measured(flat, *given)
    assert found["tokens"] == 3
    assert (found["together"] > 3) == (texts > 1)
    assert found["counted_B"] <= found["allowed_B"]
    assert 0.5 * found["counted_B"] < found["peak_B"] < found["counted_B"]


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")])
def test_refused_memory_ends_the_sweep_with_a_way_out(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    expected = logits_of(model, PROMPT)
    inner = offload.skeleton_layer(model, 2)

    def greedy(*_: object, **__: object) -> None:
        raise failure

    with monkeypatch.context() as scarce:
        scarce.setattr(inner.mlp, "forward", greedy)
        with pytest.raises(NotEnoughRam, match="memory ran out while layer 2 computed"):
            logits_of(model, PROMPT)
    assert torch.equal(logits_of(model, PROMPT), expected), "the next sweep is as good as ever"


def test_memory_that_the_allocator_really_refuses_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    inner = offload.skeleton_layer(model, 1)
    monkeypatch.setattr(inner.mlp, "forward", lambda rows: torch.empty(1 << 55))
    with pytest.raises(NotEnoughRam, match="layer 1"):
        logits_of(model, PROMPT)


def test_memory_of_a_gpu_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    inner = offload.skeleton_layer(model, 0)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(inner.mlp, "forward", full)
    with pytest.raises(NotEnoughVram, match="Tried to allocate"):
        logits_of(model, PROMPT)


def test_a_layer_that_cannot_be_unpacked_ends_the_sweep_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama", tmp_path / "m")
    pack(plan(open_folder(tmp_path / "m"), "int8"), tmp_path / "packed")
    model = offload.load(tmp_path / "packed", "disk")
    expected = logits_of(model, PROMPT)
    unpack = Block.dense

    def scarce(block: Block, *given: object) -> object:
        if block.label == "layer 2":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return unpack(block, *given)  # type: ignore[arg-type]  # as it was called

    with monkeypatch.context() as full:
        full.setattr(Block, "dense", scarce)
        with pytest.raises(NotEnoughVram, match="GPU memory ran out while layer 2 computed"):
            logits_of(model, PROMPT)
    assert torch.equal(logits_of(model, PROMPT), expected)


def test_a_gpu_that_is_full_when_a_model_is_loaded_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama", tmp_path)
    threads = {*threading.enumerate()}

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for place in ("_fill_rest", "open_stream"):
        with monkeypatch.context() as busy:
            busy.setattr(loading, place, full)
            with pytest.raises(NotEnoughVram, match="GPU memory ran out while loading; the plan was"):
                offload.load(tmp_path, "disk")
    assert started_since(threads) == set()


def test_a_full_device_unpins_what_was_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    here = StandIn()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):
        DeviceWire(here, 1, 64, [Arena(1024)])
    assert [entry[0] for entry in here.log] == ["pinned", "unpinned"]


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    inner = offload.skeleton_layer(model, 0)
    monkeypatch.setattr(inner.mlp, "forward", lambda rows: rows @ torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits_of(model, PROMPT)


def test_two_hundred_aborted_sweeps_leave_nothing_behind(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    stream = offload.stream_of(model).stream
    expected = logits_of(model, PROMPT)

    files, threads = open_below(tmp_path), {*threading.enumerate()}
    for aborted in range(200):
        stream.take(aborted % 4)
    assert torch.equal(logits_of(model, PROMPT), expected)
    assert open_below(tmp_path) == files
    assert started_since(threads) == set()


@pytest.mark.parametrize(("rows", "asked_anew"), [(256, False), (1024, True)])
def test_a_sweep_over_few_rows_finds_the_memory_that_earlier_ones_freed(
    rows: int, asked_anew: bool, tmp_path: Path
) -> None:
    """Many give it back instead: what they would keep is more than was counted."""
    tiny("llama", tmp_path, max_position_embeddings=2048, intermediate_size=2048)
    model, tokens = offload.load(tmp_path, "disk"), torch.full((1, rows), 3)
    logits_of(model, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    logits_of(model, tokens)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    of_one_product = rows * 2048 * 4 // resource.getpagesize()
    assert (pages > 4 * of_one_product) is asked_anew, pages


def test_holes_in_memory_are_given_back_once_before_a_sweep_over_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama", tmp_path, max_position_embeddings=2048)
    model, given = offload.load(tmp_path, "disk"), list[int]()
    monkeypatch.setattr("offload.machine.heap._trim", given.append)
    logits_of(model, PROMPT)
    assert given == []
    logits_of(model, torch.full((1, 1024), 3))
    assert given == [0]
