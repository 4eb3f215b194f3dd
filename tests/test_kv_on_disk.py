"""Keys and values that live on disk change no bit, take no memory, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import offload
import specexec
from cli.engine.prefix_store import PrefixStore
from offload.errors import DiskFull, NotEnoughRam
from offload.machine.host_rows import DiskCarrier
from offload.machine.memory import Free
from offload.placement.placement import Need
from offload.placement.solver import place
from specexec import SamplingParams
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.cache_in_ram import Travel
from specexec.model.tree_lm import TreeLM
from tests.tiny import LAYERS, VOCABULARY, tiny
from tests.writing import prompt, write

PROMPTS = [prompt(20), prompt(250, 2)]
WARM = SamplingParams(max_tokens=10, temperature=0.9, seed=3)
MOVING = Need(
    (1000,) * 4, (1000,) * 4, embeddings_B=100, norms_B=10, head_B=0, cache_B=4000, ctx=1000, cache_moves=True
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_texts_and_rows_are_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    whole = tiny(family, tmp_path / "m")
    away = TreeLM(whole, travel=Travel(frozenset(range(LAYERS)), DiskCarrier(tmp_path / "kv", None)))
    texts = []
    for target in (TreeLM(whole), away):
        drafter = SiblingDrafter(TreeLM(target.model), VOCABULARY, Ranking(shared_noise=False))
        written = write(target, drafter, PROMPTS, WARM, 16, overlap=False)
        texts.append([(one.tokens, one.caches[target]) for one in written])
    for (tokens, rows), (same, others) in zip(*texts, strict=True):
        assert tokens == same
        for layer in range(LAYERS):
            for ours, theirs in rows.layers[layer].runs(others.layers[layer], 0, len(rows)):
                assert torch.equal(ours, theirs), layer
    assert list((tmp_path / "kv").iterdir()) == [], "files without a name"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_engine_writes_the_same_from_there_and_says_so(home: Path, tmp_path: Path) -> None:
    ask = "How does specexec work?"
    with specexec.load("demo", drafter="none") as plain, specexec.load("demo", drafter="none", kv="disk") as llm:
        assert "on SSD, up to" in llm.placement
        assert "SSD" not in plain.placement
        assert llm.generate(ask, WARM).tokens == plain.generate(ask, WARM).tokens
        parts = [offload.stream_of(one._model).placement.host_parts_B for one in (plain, llm)]
        saved_B = sum(parts[0].values()) - sum(parts[1].values())
        assert saved_B > parts[0][f"KV cache at --ctx {llm.context}"] / 2
        assert llm.room.holds([llm.context])
        assert not llm.room.holds([llm.context, llm.context]), "the disk was asked for one full context"
        llm.prefixes = PrefixStore.of(llm, tmp_path / "prefixes")
        text = llm.encode("What is a tree, and what is a drafter? " * 60)
        first = llm.generate(text, WARM).tokens
        assert llm.prefixes.known(text) > 16
        assert llm.generate(text, WARM).tokens == first, "a beginning from the prefix cache goes on there"


def test_memory_is_left_for_disk_only_where_it_was_asked_for() -> None:
    free = Free(4500)
    with pytest.raises(NotEnoughRam) as refused:
        place(MOVING, free, "disk")
    assert "--kv disk" in (refused.value.hint or "")
    for kv in ("disk", "auto"):
        placed = place(MOVING, free, "disk", kv)
        assert placed.caches == ("disk",) * 4
        assert placed.cache_disk_B == 4000
        assert placed.host_parts_B["KV on its way"] == 2000
        assert "KV on SSD, up to" in placed.summary
    assert place(MOVING, Free(9000), "disk", "auto").caches == ("device",) * 4
    assert place(replace(MOVING, cache_stays=frozenset({1})), Free(5500), "disk", "disk").caches.count("device") == 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(DiskFull, match="keys and values of a full context take"):
        specexec.load("demo", drafter="none", kv="disk")


def test_a_write_that_finds_no_room_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="No space left on device"):
        DiskCarrier(tmp_path, None).memory(torch.zeros(1), (2, 3, 4))


HOLDING = """
import sys, torch
from pathlib import Path
from offload.machine.host_rows import DiskCarrier
held = DiskCarrier(Path(sys.argv[1]), None).memory(torch.zeros(1), (1, 1024, 256))
held.fill_(1)
print("held", flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
