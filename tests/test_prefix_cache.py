"""The prefix cache: a beginning from disk has the bits of one that was computed, and what is not sure is not used."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import specexec
from cli.app import commands
from cli.engine.model_identity import fingerprint, identities_of
from cli.engine.prefix_chain import BLOCK
from cli.engine.prefix_store import PrefixStore, everything, forget, limit_B, make_room, prefixes_folder, set_limit
from offload.hub.names import HERE
from specexec.compose.load_options import LoadOptions
from specexec.engine.engine import Engine
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows
from specexec.sampling.params import SamplingParams
from tests.tiny import tiny
from tests.writing import rows_read

WARM = SamplingParams(temperature=1, seed=5, max_tokens=12)
PLAIN = LoadOptions(drafter="none", ctx=8192)
LONG = [*range(20, 3020)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    tiny("llama", folder, vocab_size=4096, max_position_embeddings=32768, num_hidden_layers=2, eos_token_id=3)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(HERE / "demo" / "target" / file, folder)
    return folder


def opened(folder: Path, kept: Path, options: LoadOptions = PLAIN) -> Engine:
    engine = specexec.load(str(folder), options)
    engine.prefixes = PrefixStore.of(engine, kept)
    return engine


@pytest.fixture
def kept(folder: Path, tmp_path: Path) -> Path:
    """What another run has left of a text of 3,000 tokens and its answer."""
    with opened(folder, tmp_path / "kept") as engine:
        engine.generate(LONG, WARM)
    return tmp_path / "kept"


def files(kept: Path) -> list[Path]:
    return sorted(kept.glob("*/*.safetensors"))


def read_of(engine: Engine, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[int, tuple[int, ...]]:
    """How many rows of a prompt were read, and what was written."""
    with monkeypatch.context() as patch:
        read = rows_read(engine._target, patch)
        written = engine.generate(tokens, WARM).tokens
    return read[0], written


def test_another_run_reads_what_is_new_and_writes_the_same(
    folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [*LONG[:1000], 7, *LONG[1000:]]
    with specexec.load(str(folder), drafter="none", ctx=8192) as plain:
        expected = [plain.generate(text, WARM).tokens for text in (LONG, other)]
    with opened(folder, kept) as engine:
        assert read_of(engine, LONG, monkeypatch) == (len(LONG) - len(LONG) // BLOCK * BLOCK, expected[0])
        assert read_of(engine, other, monkeypatch) == (len(other) - 1000 // BLOCK * BLOCK, expected[1])
        (rows_B,) = {file.stat().st_size for file in files(kept) if "-" not in file.name}
        assert rows_B < 1.1 * BLOCK * engine.weights.placement.need.cache_B / 8192  # type: ignore[attr-defined]


def test_rows_from_disk_are_those_that_were_computed(folder: Path, kept: Path) -> None:
    with opened(folder, kept) as engine:
        lm = engine.models["target"]
        found: dict[object, KVCache] = {}
        engine.prefixes.fill(LONG, found)
        cache, computed = found[lm], KVCache()
        lm.forward([Rows.text(computed, cache.tokens)])
        computed.commit(range(len(cache)))
        assert len(cache) == len(LONG) // BLOCK * BLOCK
        for layer, kv in computed.layers.items():
            for ours, theirs in kv.runs(cache.layers[layer], 0, len(cache)):
                assert torch.equal(ours, theirs)


def test_texts_that_begin_alike_share_files(folder: Path, kept: Path) -> None:
    before = len(files(kept))
    with opened(folder, kept) as engine:
        engine.generate([*LONG, 9], WARM)
        assert len(files(kept)) == before + 1, "another end"
        engine.generate_many([[*LONG[:2000], 8], [*LONG[:2000], 9]])
    assert len(files(kept)) == before + 1


def test_a_longer_text_takes_the_place_of_its_own_end(folder: Path, tmp_path: Path) -> None:
    with opened(folder, tmp_path) as engine:
        first = engine.generate(LONG[:100], WARM)
        assert len(files(tmp_path)) == 1
        engine.generate([*LONG[:100], *first.tokens, 5], WARM)
        assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["a bit", "half", "nothing", "another's", "a folder"])
def test_what_is_damaged_is_removed_and_read_again(
    damage: str, folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with specexec.load(str(folder), drafter="none", ctx=8192) as plain:
        expected = plain.generate(LONG, WARM).tokens
    with opened(folder, kept) as engine:
        (chain,) = engine.prefixes._chains.values()  # type: ignore[attr-defined]
        third, fourth = (chain.folder / f"{key}.safetensors" for key in chain._keys(LONG)[3:5])
        whole = third.read_bytes()
        if damage == "a folder":
            third.unlink()
            third.mkdir()
        elif damage == "another's":
            shutil.copy(fourth, third)
        else:
            changed = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
            third.write_bytes({"a bit": changed, "half": whole[: len(whole) // 2], "nothing": b""}[damage])
        rows, written = read_of(engine, LONG, monkeypatch)
        assert written == expected
        assert f"{third} is damaged" in caplog.text
        if damage != "a folder":
            assert rows == len(LONG) - 2 * BLOCK
            assert engine.prefixes.known(LONG) == len(LONG) // BLOCK * BLOCK, "written again"


def test_another_model_or_another_way_to_compute_finds_nothing(
    folder: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    tiny("llama", other, seed=1, vocab_size=4096, max_position_embeddings=32768, num_hidden_layers=2, eos_token_id=3)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / file, other)
    ways = [(other, PLAIN), (folder, replace(PLAIN, dtype="bf16")), (folder, replace(PLAIN, kv_quant=8))]
    for at, options in ways:
        with opened(at, kept, options) as engine:
            assert engine.prefixes.known(LONG) == 0, options
    with opened(folder, kept) as engine:
        assert engine.prefixes.known(LONG) > 2800
        same = identities_of(engine)["target"].digest
        monkeypatch.setattr("cli.engine.model_identity.version", lambda _: "another")
        assert identities_of(engine)["target"].digest != same


def test_one_weight_written_to_in_place_makes_another_model(folder: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(folder, tmp_path / "same"))
    before, (file,) = fingerprint(same), same.glob("*.safetensors")
    status, content = file.stat(), bytearray(file.read_bytes())
    content[status.st_size // 2] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(same) != before


def test_the_least_recently_used_leaves_first_and_ends_before_beginnings(folder: Path, tmp_path: Path) -> None:
    one, two = LONG[:1000], [*range(500, 1500)]
    with opened(folder, tmp_path) as engine:
        engine.generate(one, WARM)
        engine.generate(two, WARM)
        engine.generate(one, WARM)  # used again
        block_B = max(file.stat().st_size for file in files(tmp_path))
        set_limit(tmp_path, 5 * (block_B + 4096))
        assert engine.prefixes.known(one) >= 3 * BLOCK
        assert 0 < engine.prefixes.known(two) < 3 * BLOCK
        assert sum(model.size_B for model in everything(tmp_path)) <= limit_B(tmp_path)
        set_limit(tmp_path, 0)
        engine.generate(two, WARM)
        assert files(tmp_path) == []


def test_what_a_dead_process_left_behind_is_cleared_away(kept: Path) -> None:
    inner = files(kept)[0].parent
    fresh, stale = (inner / name for name in (".fresh.safetensors.1a", ".stale.safetensors.2b"))
    for file in (fresh, stale):
        file.write_bytes(b"half")
    os.utime(stale, (0, 0))
    make_room(kept)
    assert (fresh.exists(), stale.exists()) == (True, False)


def write_and_read(folder: Path, kept: Path, first: int, together: Barrier) -> None:
    with opened(folder, kept) as engine:
        together.wait(120)
        for turn in range(6):
            engine.generate([*LONG[:600], first + turn, *LONG[:300]], WARM)


def test_two_processes_at_once_disturb_no_text(folder: Path, tmp_path: Path) -> None:
    kept, ways = tmp_path / "kept", multiprocessing.get_context("spawn")
    set_limit(kept, 1_500_000)  # both make room for themselves all the time
    together = ways.Barrier(2)
    other = ways.Process(target=write_and_read, args=(folder, kept, 100, together))
    other.start()
    write_and_read(folder, kept, 103, together)
    other.join(120)
    assert other.exitcode == 0
    text = [*LONG[:600], 104, *LONG[:300]]
    with opened(folder, kept) as engine, specexec.load(str(folder), drafter="none", ctx=8192) as plain:
        assert engine.generate(text, WARM).tokens == plain.generate(text, WARM).tokens


def test_what_is_kept_is_its_owners_alone(kept: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in files(kept)} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in files(kept)} == {0o700}


def test_a_disk_without_room_keeps_nothing_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 29))
    with opened(folder, tmp_path) as engine:
        engine.generate(LONG[:300], WARM)
        engine.generate(LONG[:400], WARM)
    assert files(tmp_path) == []
    assert caplog.text.count("less than 1 GiB to spare") == 1


def test_a_text_that_is_forgotten_is_nowhere(folder: Path, kept: Path) -> None:
    forget(LONG, kept)
    with opened(folder, kept) as engine:
        assert engine.prefixes.known(LONG) == 0


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def said(*arguments: str) -> str:
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_runs_of_generate_share_it_where_they_are_asked_to(home: Path, tmp_path: Path) -> None:
    ask = ("generate", "-p", "How does specexec work?", "-d", "none", "-n", "3", "-t", "0")
    said(*ask)
    assert json.loads(said("cache", "size", "--json"))["size_B"] == 0, "off unless asked for"
    first = said(*ask, "--prefix-cache")
    (model,) = [json.loads(line) for line in said("cache", "list", "--json").splitlines()]
    assert model["model"].endswith("demo/target")
    assert json.loads(said("cache", "size", "--json"))["size_B"] == model["size_B"] > 0
    assert said(*ask, "--prefix-cache") == first
    said("cache", "limit", "1GB")
    assert limit_B(prefixes_folder()) == 10**9
    said("cache", "clear")
    assert said("cache", "list").strip() == "the prefix cache is empty"
    assert limit_B(prefixes_folder()) == 10**9
