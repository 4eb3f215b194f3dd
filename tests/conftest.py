"""Tests compare floats between runs: one thread makes every run take the same order, and keeps busy machines fair."""

import gc
import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # programs that tests start, too: they share the machine
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from hypothesis import HealthCheck, settings

from cli.engine.imports import lean_imports
from tests.fake_hub import FakeHub

with lean_imports():
    import torch

    from tests.tiny import tiny

if TYPE_CHECKING:
    from offload.checkpoint.quantized.quantize import Quant
    from tests.command_line import CommandLine
    from tests.serving import Served
    from tests.writing import TargetAndDrafters

torch.set_num_threads(1)

# The same examples in every run, and all the time that a busy machine needs; --hypothesis-profile=default draws others.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

# A shell that starts the tests in the background makes them, and every program they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Libraries and tests stay to the end: no collection of garbage looks through their objects, now or later."""
    gc.disable()
    found = yield
    gc.enable()
    gc.collect()
    gc.freeze()
    return found


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of its own for each test; pytest would look through those of all others to number it."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in count())


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, homes: Iterator[Path]) -> None:
    """No test reads or writes the conversations and settings of the user who runs it."""
    home = next(homes)
    home.mkdir()
    for kind in ("DATA", "CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(home / kind.lower()))
    for name in ("SPECEXEC_HOME", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.setenv(name, "")  # remembered, so that what a command says is forgotten with its test
        monkeypatch.delenv(name)


@pytest.fixture
def real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "CommandLine":
    """Commands with the real engine, in a folder of the test's own."""
    from tests.command_line import CommandLine
    from tests.fake_engine import FakeEngine

    monkeypatch.chdir(tmp_path)
    made = CommandLine(capsys, monkeypatch, FakeEngine())
    made.load_what_is_asked()
    return made


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub with a tiny model and one of a single layer."""
    tiny("llama", tmp_path / "big")
    tiny("llama", tmp_path / "small", num_hidden_layers=1)
    with FakeHub({"org/big": tmp_path / "big", "org/small": tmp_path / "small"}).open() as hub:
        yield hub


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[TargetAndDrafters]":
    """A target that is closed after the module."""
    from tests.writing import TargetAndDrafters

    made = TargetAndDrafters(tmp_path_factory.mktemp("llama"))
    yield made
    made.target.close()


@pytest.fixture(scope="module")
def letters() -> "Iterator[Served]":
    """A server whose model writes letters."""
    from tests.serving import LetterEngine, serving

    with serving(LetterEngine) as served:
        yield served


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Served]":
    """A server whose model thinks and calls tools."""
    from tests.agent import agent_server  # with the server's libraries, which most tests need not load

    with agent_server(tmp_path_factory.mktemp("agent")) as served:
        yield served


LOG_LEVELS = {logger: logger.level for logger in map(logging.getLogger, (None, "specexec", "offload", "cli"))}


@pytest.fixture(autouse=True)
def own_log_levels() -> None:
    """A command run inside the test process, or in a fixture of a whole module, sets the level of our logs."""
    for logger, level in LOG_LEVELS.items():
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def no_drafter_fails(request: pytest.FixtureRequest) -> Iterator[None]:
    """Texts stay right when a drafter fails, so a fault in ours would go unnoticed; marked tests make one fail."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("specexec.drafters.protocol.guarded")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not said or request.node.get_closest_marker("drafter_fails")


@pytest.fixture(scope="session")
def pack_of(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str, Quant], Path]":
    """A pack of a tiny model of a family, each made once; the model itself lies beside it as `whole`."""
    from offload.checkpoint.headers import open_folder
    from offload.packs.pack import pack, plan

    @cache
    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny(family, folder / "whole")
        return folder

    @cache
    def of(family: str, quant: "Quant") -> Path:
        folder = folder_of(family)
        pack(plan(open_folder(folder / "whole"), quant), folder / quant)
        return folder / quant

    return of


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models: `m` of 250 MB in many layers, and a `small` one."""
    folder = tmp_path_factory.mktemp("deep")
    tiny("llama", folder / "m", hidden_size=512, intermediate_size=1536, num_hidden_layers=24, head_dim=128)
    tiny("llama", folder / "small")
    return folder
