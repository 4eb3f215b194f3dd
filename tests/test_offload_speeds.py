"""What was measured is believed on the machine where it was measured, and there alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import offload
from offload.files import SAFE
from offload.machine import machine
from offload.placement import Free, Need, Placement
from offload.placing import place
from offload.speeds import ALONE, Arithmetic, ASSUMED_LINK_Bps, Company, Disk, Speeds, save_speeds
from tests.tiny import tiny

HERE = {"processor": "Fast 9000", "GPU": "H1"}
SPEEDS = Speeds(
    {"8:1": Disk(2e9, SAFE, Company(0.5, 0.5))},
    1e10,
    {"cpu/f32": Arithmetic(1e11, 1e10), "cuda/f32": Arithmetic(1e13, 1e11)},
    "2026-01-01",
    {"cpu/nf4": 1e9, "cuda/nf4": 1e11},
    {"cpu": {"torch": "2", "processor": "Fast 9000"}, "cuda": {"torch": "2"} | HERE},
)


@pytest.mark.parametrize(
    ("then", "believed"),
    [(HERE, True), (HERE | {"GPU": "H2"}, False), (HERE | {"processor": "Slow 1"}, False), ({}, False)],
)
def test_loading_believes_a_link_on_the_machine_where_it_was_measured(
    then: Mapping[str, str], believed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []

    def placed(need: Need, free: Free, mode: offload.Offload) -> Placement:
        used.append(free.link_Bps)
        return place(need, free, mode)

    monkeypatch.setattr("offload.model.free_memory", lambda *_: Free(1 << 30, 1 << 30))  # a CPU in the place of a GPU
    monkeypatch.setattr("offload.model.place", placed)
    monkeypatch.setattr("offload.model.machine", lambda device: HERE)
    save_speeds(Speeds({}, 1e9, conditions={"cuda": {"torch": "1", **then}}))
    tiny("llama", tmp_path)
    offload.load(tmp_path)
    assert used == [1e9 if believed else ASSUMED_LINK_Bps]


def test_what_was_measured_under_other_conditions_goes_with_what_depends_on_it() -> None:
    then = SPEEDS.conditions
    assert SPEEDS.believed("cpu", then["cpu"]) == SPEEDS.believed("cuda", then["cuda"]) == SPEEDS
    on_cpu = SPEEDS.believed("cpu", {**then["cpu"], "torch": "3"})
    assert (on_cpu.disks["8:1"], on_cpu.link_Bps) == (Disk(2e9, SAFE, ALONE), 1e10)
    assert (set(on_cpu.arithmetic), set(on_cpu.unpack_Bps)) == ({"cuda/f32"}, {"cuda/nf4"})
    on_gpu = SPEEDS.believed("cuda", {**then["cuda"], "torch": "3"})
    assert (on_gpu.disks, on_gpu.link_Bps) == (SPEEDS.disks, 1e10), "no other torch makes another link"
    assert (set(on_gpu.arithmetic), set(on_gpu.unpack_Bps)) == ({"cpu/f32"}, {"cpu/nf4"})
    assert SPEEDS.believed("cuda", {**then["cuda"], "GPU": "H2"}) == replace(on_gpu, link_Bps=None)


def test_the_driver_tells_which_gpu_there_is_before_a_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.machine.gpus", lambda: pytest.fail("a program was started"))
    for bus, name in (("0000:0b:00.0", "NVIDIA H2"), ("0000:0a:00.0", "NVIDIA H1")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 42\n")
    assert machine("cuda", tmp_path)["GPU"] == "NVIDIA H1, NVIDIA H2"
    assert machine("cpu", tmp_path).keys() == {"processor"}
    monkeypatch.setattr("offload.machine.gpus", list)
    assert machine("cuda", tmp_path / "none")["GPU"] == "none"
