"""What was measured is believed on the machine where it was measured, and there alone."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import offload
from offload.machine.files import SAFE
from offload.machine.identity import machine
from offload.machine.memory import Free
from offload.machine.speeds import ALONE, Arithmetic, ASSUMED_LINK_Bps, Contention, Disk, Speeds, disk_key, save_speeds
from offload.placement.placement import KVHome, Need, Placement
from offload.placement.solver import place
from tests.tiny import tiny

HERE = {"processor": "Fast 9000", "GPU": "H1"}
SPEEDS = Speeds(
    {"8:1": Disk(2e9, SAFE, Contention(0.5, 0.5))},
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

    def placed(need: Need, free: Free, mode: offload.Offload, kv: KVHome) -> Placement:
        used.append(free.link_Bps)
        return place(need, free, mode, kv)

    monkeypatch.setattr(
        "offload.model.load.free_memory", lambda *_: Free(1 << 30, 1 << 30)
    )  # a CPU in the place of a GPU
    monkeypatch.setattr("offload.model.load.place", placed)
    monkeypatch.setattr("offload.model.load.machine", lambda device: HERE)
    save_speeds(Speeds({}, 1e9, conditions={"cuda": {"torch": "1", **then}}))
    tiny("llama", tmp_path)
    offload.load(tmp_path)
    assert used == [1e9 if believed else ASSUMED_LINK_Bps]


def test_what_was_measured_under_other_conditions_goes_with_what_depends_on_it() -> None:
    then = SPEEDS.conditions
    assert SPEEDS.valid_under("cpu", then["cpu"]) == SPEEDS.valid_under("cuda", then["cuda"]) == SPEEDS
    on_cpu = SPEEDS.valid_under("cpu", {**then["cpu"], "torch": "3"})
    assert (on_cpu.disks["8:1"], on_cpu.link_Bps) == (Disk(2e9, SAFE, ALONE), 1e10)
    assert (set(on_cpu.arithmetic), set(on_cpu.unpack_Bps)) == ({"cuda/f32"}, {"cuda/nf4"})
    on_gpu = SPEEDS.valid_under("cuda", {**then["cuda"], "torch": "3"})
    assert (on_gpu.disks, on_gpu.link_Bps) == (SPEEDS.disks, 1e10), "no other torch makes another link"
    assert (set(on_gpu.arithmetic), set(on_gpu.unpack_Bps)) == ({"cpu/f32"}, {"cpu/nf4"})
    assert SPEEDS.valid_under("cuda", {**then["cuda"], "GPU": "H2"}) == replace(on_gpu, link_Bps=None)


def test_the_driver_tells_which_gpu_there_is_before_a_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.machine.identity.gpus", lambda: pytest.fail("a program was started"))
    for bus, name in (("0000:0b:00.0", "NVIDIA H2"), ("0000:0a:00.0", "NVIDIA H1")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 42\n")
    assert machine("cuda", tmp_path)["GPU"] == "NVIDIA H1, NVIDIA H2"
    assert machine("cpu", tmp_path).keys() == {"processor"}
    monkeypatch.setattr("offload.machine.identity.gpus", list)
    assert machine("cuda", tmp_path / "none")["GPU"] == "none"


def test_another_disk_is_not_as_fast_as_the_one_that_had_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: [])
    number = disk_key(tmp_path, tmp_path / "none")
    assert re.fullmatch(r"\d+:\d+", number)
    disk, partition = tmp_path / "sda", tmp_path / "sda" / "sda1"
    (disk / "device").mkdir(parents=True)
    partition.mkdir()
    (tmp_path / number).symlink_to(partition)
    keys = set()
    for model, sectors in (("Fast  9000", 500), ("Slow 1", 500), ("Slow 1", 700)):
        (disk / "device" / "model").write_text(f"{model} \n")
        (partition / "size").write_text(f"{sectors}\n")
        keys.add(disk_key(tmp_path, tmp_path))
    assert keys == {f"{number} Fast 9000 500", f"{number} Slow 1 500", f"{number} Slow 1 700"}


def mounted(source: str, at: Path, kind: str) -> SimpleNamespace:
    return SimpleNamespace(device=source, mountpoint=str(at), fstype=kind)


def test_a_disk_without_a_name_in_sys_is_known_by_what_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, none = tmp_path / "models", tmp_path / "none"
    (models / "llama").mkdir(parents=True)
    (tmp_path / "modelship").mkdir()
    (tmp_path / "link").symlink_to(models)
    mounts = [
        mounted("overlay", Path("/"), "overlay"),
        mounted("systemd-1", models, "autofs"),
        mounted("server:/models", models, "nfs4"),
        mounted("", tmp_path / "modelship", "tmpfs"),
    ]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: mounts)
    assert disk_key(tmp_path, none) == "overlay overlay"
    assert (
        disk_key(models / "llama" / "not" / "yet", none) == disk_key(tmp_path / "link", none) == "server:/models nfs4"
    )
    assert disk_key(tmp_path / "modelship", none) == "tmpfs"


def test_a_part_of_a_file_system_is_on_the_disk_that_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = next((file for file in Path("/dev").iterdir() if file.is_block_device()), None)
    if disk is None:
        pytest.skip("no disk has a file here")
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: [mounted(str(disk), tmp_path, "btrfs")])
    number = f"{os.major(disk.stat().st_rdev)}:{os.minor(disk.stat().st_rdev)}"
    assert disk_key(tmp_path, tmp_path / "none") == number
    (tmp_path / number / "device").mkdir(parents=True)
    (tmp_path / number / "device" / "model").write_text("Fast 9000\n")
    assert disk_key(tmp_path, tmp_path) == f"{number} Fast 9000"


def test_two_processors_of_one_name_are_two(tmp_path: Path) -> None:
    kinds = []
    for model in (1, 17):
        told = tmp_path / f"{model}"
        told.write_text(
            f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n"
        )
        kinds.append(machine("cpu", tmp_path, told)["processor"])
    assert kinds == ["AMD EPYC 25 1", "AMD EPYC 25 17"]
