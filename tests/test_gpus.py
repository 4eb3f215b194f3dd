"""GPUs as the system describes them, on a system of files: their memory, and the link that their slot gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.app import main
from cli.models.doctor import _gpu
from cli.models.gpu_cards import link_of
from offload.machine.gpus import AMD, Gpu, PciLink, gpus
from offload.units import GiB
from tests.tiny import tiny


def device(place: Path, **files: str) -> Path:
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(f"{text}\n")
    return place


def smi(monkeypatch: pytest.MonkeyPatch, folder: Path, answer: str) -> None:
    """A program of NVIDIA's driver that answers so."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_nvidia_cards_say_what_their_slot_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(
        monkeypatch,
        tmp_path,
        "NVIDIA GeForce RTX 4090, 23000, 24564, 4, 16\nNVIDIA GeForce RTX 3060, 11000, 12288, [N/A], [N/A]",
    )
    fast, hidden = gpus(tmp_path / "none")
    assert fast == Gpu("NVIDIA GeForce RTX 4090", 23000 << 20, 24564 << 20, PciLink(4, 16))
    assert (hidden.total_B, hidden.link) == (12288 << 20, None)


def test_an_amd_card_is_as_fast_as_the_slot_behind_its_own_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fast = {"max_link_speed": "16.0 GT/s PCIe", "current_link_width": "16"}
    device(tmp_path / "0000:00:01.1", max_link_speed="8.0 GT/s PCIe", current_link_width="4")
    switch = device(tmp_path / "0000:00:01.1" / "0000:01:00.0", max_link_speed="16.0 GT/s PCIe", current_link_width="4")
    memory = {"mem_info_vram_total": str(24 * GiB), "mem_info_vram_used": str(GiB)}
    card = device(switch / "0000:02:00.0" / "0000:03:00.0", vendor=AMD, device="0x744c", **memory, **fast)
    inside = device(tmp_path / "0000:00:08.0", vendor=AMD, device="0x15bf", **memory)
    pci = tmp_path / "pci"
    pci.mkdir()
    for one in (card, inside):
        (pci / one.name).symlink_to(one)
    names = tmp_path / "pci.ids"
    names.write_text("1001  Other\n\t744c  Wrong\n1002  AMD/ATI\n\t744c  Navi 31 [Radeon RX 7900 XTX]\n")
    assert gpus(pci, (names,)) == [Gpu("AMD Radeon RX 7900 XTX", 23 * GiB, 24 * GiB, PciLink(3, 4))]
    assert gpus(pci, ())[0].name == "AMD GPU 744c"


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", PciLink(4, 8)),
        ("NVIDIA GeForce RTX 5090", PciLink(5, 16)),
        ("AMD Radeon RX 7900 XTX", PciLink(4, 16)),
        ("Intel(R) Arc B580 Graphics", PciLink(4, 8)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD GPU 744c", None),
    ],
)
def test_a_card_is_known_by_the_name_that_its_driver_gives_it(name: str, link: PciLink | None) -> None:
    assert link_of(name) == link


def test_doctor_says_when_a_slot_is_narrower_than_the_card() -> None:
    wide = _gpu(Gpu("NVIDIA GeForce RTX 4090", 23 * GiB, 24 * GiB, PciLink(4, 16)))
    assert (wide.status, wide.fix) == ("ok", None)
    assert "PCIe 4 x16" in wide.found
    narrow = _gpu(Gpu("NVIDIA GeForce RTX 4090", 23 * GiB, 24 * GiB, PciLink(4, 4)))
    assert narrow.status == "warn"
    assert "made for PCIe 4 x16" in str(narrow.fix)


def test_plan_expects_of_a_card_what_its_lanes_carry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama", tmp_path)
    found = {}
    for name in ("4060", "4090", "RX 9070 XT", "Arc B580"):
        assert main(["plan", str(tmp_path), "--gpu", name, "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)["speeds"]["link_Bps"]
    assert found == {"4060": 12e9, "4090": 24e9, "RX 9070 XT": 48e9, "Arc B580": 12e9}
