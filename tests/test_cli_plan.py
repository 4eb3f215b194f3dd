"""plan tells what fits and how fast from headers alone; doctor looks, measures and keeps."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import specexec
from cli.app import main
from cli.models.outlook import OutlookRow, best, outlook
from cli.shared.conditions import conditions
from offload.checkpoint.documents import read_json
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import open_folder
from offload.checkpoint.routing import Routing
from offload.hub.headers_only import item_B, list_model
from offload.hub.names import demo_folder
from offload.machine.files import SAFE, Reading
from offload.machine.integer_products import way
from offload.machine.memory import Free, Ram
from offload.machine.speeds import (
    ALONE,
    Arithmetic,
    Contention,
    Disk,
    Speeds,
    disk_key,
    load_speeds,
    reading_for,
    save_speeds,
)
from offload.measure import READINGS, Trial, choose, probe_contention, probe_disk, probe_unpack, write_sample
from offload.model.load import load, stream_of
from offload.packs.pack import pack
from offload.packs.pack import plan as pack_plan
from offload.placement.forecast import ASSUMED_CPU, SCHEMES, Ceilings, Forecast, Work, ceilings, forecast
from offload.placement.placement import Need
from offload.placement.quantized_sizes import FORMATS, Format, need_in, packed_size_B, work_of
from offload.placement.requirements import need_of
from offload.placement.solver import place
from offload.units import GiB, size
from specexec.compose.load_options import LoadOptions
from specexec.compose.memory_plan import LoadRequest, memory_plan
from specexec.drafters.registry import DrafterChoice
from tests.tiny import tiny

MEASURED = Speeds(
    {"8:1": Disk(2e9, Reading(1 << 20, 4, False))},
    12e9,
    {"cpu/bf16": Arithmetic(1e11, 1e10)},
    "2026-01-01",
    {"cpu/nf4": 5e8, "cpu/int8": 1e9, "cpu/int4": 2e9, "cpu/mxfp4": 4e8},
    {"cpu": {"torch": "2.13.0"}},
)
KNOWN = Ceilings(1e9, 10e9, Arithmetic(1e12, 1e10), dict.fromkeys(SCHEMES, 2e9))


PLAIN = DrafterChoice(())


def asked(folder: Path, free: Free, ctx: int) -> LoadRequest:
    """The folder alone, without drafters and guesses."""
    return LoadRequest.of(open_folder(folder), (), LoadOptions(budget=0), ctx, free)


def looked_at(folder: Path, free: Free, ctx: int, every: bool = False) -> list[OutlookRow]:
    return outlook(asked(folder, free, ctx), PLAIN, free, KNOWN, every)


def load_as_planned(folder: Path, mode: str, ctx: int) -> PreTrainedModel:
    beside = memory_plan(asked(folder, Free(4 * GiB), ctx), PLAIN)
    return load(
        folder, mode, ctx=ctx, guesses_B=beside.guesses_B, beside_B=beside.beside_B,  # type: ignore[arg-type]  # a mode
        cache_moves=True,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", tmp_path / "model")
    return tmp_path / "model"


def test_plan_and_quick_doctor_import_no_torch(folder: Path) -> None:
    for arguments in (["plan", str(folder), "--all"], ["doctor", "--quick"]):
        code = f"import sys; from cli.app import main; main({arguments!r}); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent.parent)


def test_plan_shows_every_combination_and_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--all"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if any(f" {form} " in line for form in FORMATS) and "GiB" not in line[:9]]
    assert len(rows) >= 12
    assert f"specexec chat -m {folder} --offload none" in out
    assert "Assumed, not measured: disk, compute, unpacking. `specexec doctor` measures them." in out


def test_plan_as_json_has_the_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--gpu", "12GiB", "--link", "10GB/s", "--disk", "1GB/s", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["machine"]["vram_B"] == 12 * GiB
    assert record["speeds"] == {
        "disk_Bps": 1e9, "link_Bps": 1e10, "assumed": ["compute", "unpacking"], "changed": [],
    }  # fmt: skip
    assert {(row["offload"], row["quant"]) for row in record["rows"]} == {
        (mode, form) for mode in ("none", "ram", "disk", "auto") for form in ("none", "nf4")
    }


def test_the_mix_of_tiers_is_listed_and_recommended_where_it_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep"
    tiny("llama", folder, num_hidden_layers=12)
    checked = open_folder(folder)
    need = need_in(checked, "none", 4, 64)
    rows = looked_at(folder, Free(10 * GiB), 64)
    disk = next(row for row in rows if (row.offload, row.form) == ("disk", "none"))
    assert disk.placement is not None
    free = Free(disk.placement.host_B + max(need.layers_B) * 5 // 2)  # room for some layers, not for all
    found = {row.offload: row for row in looked_at(folder, free, 64) if row.form == "none"}
    assert [mode for mode, row in found.items() if row.placement is None] == ["none", "ram"]
    mixed, streamed = found["auto"].placement, found["disk"].placement
    assert mixed is not None
    assert streamed is not None
    assert (mixed.count("device"), streamed.count("device")) == (2, 0)
    assert mixed.disk_B < streamed.disk_B
    chosen = best([*found.values()])
    assert chosen is found["auto"]
    monkeypatch.setattr("offload.machine.memory.free_ram", lambda: Ram(free.ram_B, ""))
    monkeypatch.setattr("offload.machine.memory.margin_B", lambda _: 0)
    model = load_as_planned(folder, "auto", 64)
    assert stream_of(model).placement.tiers == mixed.tiers
    stream_of(model).close()


@pytest.mark.parametrize("ram", ["3GiB", "1500MB", "2000000001"])
def test_the_command_to_type_has_the_budgets_that_were_planned_with(
    ram: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["plan", str(folder), "--ram", ram, "--vram", "2GiB", "--gpu", "4090", "--json"]
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out)["best"][-1].endswith(f" --ram {ram} --vram 2GiB")


def test_the_command_to_type_has_what_else_was_planned_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--ctx", "512", "--budget", "8", "--drafter", "demo", "--drafter-quant", "hqq3"]
    assert main(["plan", str(folder), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"][-1].endswith(" ".join(asked))
    assert main(["plan", str(folder), "--json"]) == 0
    assert "--ctx" not in json.loads(capsys.readouterr().out)["best"][-1], "what chat does by itself is not typed"


def drafting_B(parts_B: Mapping[str, int]) -> list[int]:
    """What is set aside for drafters."""
    return [parts_B.get(name, 0) for name in ("drafter", "embeddings of the drafter")]


def planned_beside(folder: Path, capsys: pytest.CaptureFixture[str], drafter: str) -> tuple[list[int], str]:
    """What is set aside for drafters, and the command to type."""
    run = ["plan", str(folder), "--gpu", "none", "--ctx", "64", "--budget", "4", "--drafter", drafter, "--json"]
    assert main(run) == 0
    record = json.loads(capsys.readouterr().out)
    return drafting_B(record["rows"][0]["ram_parts_B"]), record["best"][-1]


def test_all_drafters_that_are_named_are_counted_as_loading_counts_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny("llama", other, num_hidden_layers=2)
    for model in (folder, other):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_folder("target") / file, model / file)
    found = [planned_beside(folder, capsys, drafter) for drafter in ("none", "demo", f"{other}", f"{other}+demo+ngram")]
    none, one, two, both = (parts_B for parts_B, _ in found)
    assert none == [0, 0]
    assert both == [a + b for a, b in zip(one, two, strict=True)]
    assert found[-1][1].endswith(f" --drafter {other}+demo+ngram")
    with specexec.load(str(folder), drafter=f"{other}+demo+ngram", offload="none", ctx=64, budget=4) as llm:
        assert drafting_B(stream_of(llm._model).placement.host_parts_B) == both


@pytest.mark.parametrize(
    ("drafter", "code", "says"),
    [
        ("sibling", 2, "no drafter is paired with"),
        ("ngrm", 2, "is none of sibling"),
        ("demo+{demo}", 2, "names one model twice"),
        ("skip+ngram", 2, "is settled when it is loaded"),
        ("./nowhere", 3, "there is no folder ./nowhere"),
    ],
)
def test_a_drafter_that_cannot_be_counted_is_refused(
    drafter: str, code: int, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter = drafter.format(demo=demo_folder("drafter"))
    assert main(["plan", str(folder), "--drafter", drafter]) == code
    assert says in capsys.readouterr().err


def test_what_does_not_fit_says_so_and_the_best_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--ram", "1KiB"]) == 0
    assert "Nothing fits: --offload disk needs" in capsys.readouterr().out


def test_a_wrong_gpu_is_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--gpu", "voodoo"]) == 2
    assert "'voodoo' is no size and none of 3060" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["none", "ram", "disk", "auto"])
def test_the_plan_places_as_loading_does(mode: str, folder: Path) -> None:
    row = next(row for row in looked_at(folder, Free(4 * GiB), 512) if row.offload == mode)
    loaded = stream_of(load_as_planned(folder, mode, 512)).placement
    assert row.placement is not None
    assert row.placement.tiers == loaded.tiers
    assert row.placement.stream_B == loaded.stream_B
    assert loaded.host_B <= row.placement.host_B <= loaded.host_B * 1.01 + 4096


def test_fewer_bits_take_fewer_bytes(folder: Path) -> None:
    checked = open_folder(folder)
    none, int8, int4, nf4 = (need_in(checked, form, 4, 512) for form in FORMATS)
    assert sum(none.layers_B) > 3 * sum(int8.layers_B) > 3 * sum(int4.layers_B)
    assert sum(int8.layers_B) > sum(nf4.layers_B)
    assert nf4.dense_B >= max(none.layers_B) * 0.9
    big = Entry("w", Path("f"), 0, 2 * 8192**2, "BF16", (8192, 8192))
    assert packed_size_B(big, "nf4") * 8 / 8192**2 == pytest.approx(4.127, abs=1e-3)
    assert packed_size_B(big, "int4") * 8 / 8192**2 == pytest.approx(4.504, abs=1e-3)


@given(st.integers(1, 40), st.floats(1e8, 1e10), st.integers(1, 4096))
def test_a_sweep_takes_as_long_as_the_slowest(layers: int, disk_Bps: float, rows: int) -> None:
    need = Need((GiB,) * layers, (GiB,) * layers, 0, 0, 0, 0, 1)
    placement = place(need, Free(4 * GiB), "disk")
    told = forecast(placement, Work(layers * GiB, 2), replace(KNOWN, disk_Bps=disk_Bps), rows)
    slowest_s = max(layers * GiB / disk_Bps, layers * GiB / 1e10, layers * GiB * rows / 1e12)
    assert told.sweep_s == pytest.approx(slowest_s)
    resident = forecast(place(need, Free(64 * GiB), "none"), Work(layers * GiB, 2), KNOWN, rows)
    assert resident.bound == "compute"
    assert resident.sweep_s <= told.sweep_s or told.bound == "compute"


def test_arithmetic_lies_on_lines_between_what_was_measured() -> None:
    curve = ((16, 1e-9), (128, 3e-9), (512, 11e-9))
    told = Arithmetic(1.0, 1.0, curve)
    assert [told.seconds(1e9, 2, rows) for rows in (1, 16, 72, 128, 320, 512)] == pytest.approx([1, 1, 2, 3, 7, 11])
    assert told.seconds(1e9, 2, 896) == pytest.approx(19)
    # Nothing measured: a roof of two slopes.
    assert Arithmetic(1e12, 1e10).seconds(1e9, 2, 1) == pytest.approx(0.2)
    assert Arithmetic(1e12, 1e10).seconds(1e9, 2, 1000) == pytest.approx(2)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_unpacked_is_every_matrix_by_its_scheme(form: Format, folder: Path, tmp_path: Path) -> None:
    told = work_of(open_folder(folder), form, 4)
    pack(pack_plan(open_folder(folder), form), tmp_path / "packed")
    found = work_of(open_folder(tmp_path / "packed"), "none", 4)
    assert found.unpacked_B == told.unpacked_B
    assert found.weights_B == pytest.approx(told.weights_B, rel=0.02)  # norms are counted where headers show them
    assert set(told.unpacked_B) == {form} - {"none"}


def test_plan_says_what_sweeps_of_different_sizes_bring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("qwen3_moe", tmp_path / "m", num_experts=128, num_experts_per_tok=8)
    run = ["plan", str(tmp_path / "m"), "--offline", "--ctx", "64", "-b", "4", "--ram", "114MB", "--disk", "1.5GB/s"]
    assert main(run) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if "Experts" in line)
    assert main([*run, "--json"]) == 0
    row = next(
        r for r in json.loads(capsys.readouterr().out)["rows"] if r["offload"] == "disk" and r["quant"] == "none"
    )
    told = {one["rows"]: one["disk_B"] for one in row["moved_by_rows"]}
    assert [*told] == [1, 4, 16, 22]
    assert told[22] == row["disk_B_per_sweep"]
    model = load(tmp_path / "m", "disk", ctx=64)
    stream = stream_of(model)
    for count, disk_B in told.items():
        assert disk_B == pytest.approx(row["disk_B_per_sweep"] * float(stream.share(count)), rel=0.02)
        assert f"{size(disk_B)} from disk for {count} row" in shown
    stream.close()
    tiny("llama", tmp_path / "dense")
    assert main(["plan", str(tmp_path / "dense"), "--offline", "--ram", "104MB", "--ctx", "64", "-b", "4"]) == 0
    assert "Experts" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_compute_for_the_rows_that_are_sent_to_them(family: str, tmp_path: Path) -> None:
    model = tiny(family, tmp_path / "model")
    work = work_of(open_folder(tmp_path / "model"), "none", 4)
    held = {name: tensor.nbytes for name, tensor in model.named_parameters() if ".experts." in name}
    held = {name: nbytes for name, nbytes in held.items() if "bias" not in name}
    assert work.experts_B == pytest.approx(sum(held.values()), rel=0.02)
    assert work.routing == Routing(4, 2)
    assert work.visited(1) == pytest.approx(1 / 2)
    assert 3.9 / 4 < work.visited(16) < 1
    # A roof of arithmetic alone: an expert is not charged for rows that others get.
    flops = Arithmetic(1.0, 1e30)
    expected = 2 * 100 * (work.weights_B - work.experts_B + work.experts_B / 2) / 4
    placement = place(need_in(open_folder(tmp_path / "model"), "none", 4, 64), Free(4 * GiB), "none")
    assert forecast(placement, work, replace(KNOWN, arithmetic=flops), 100).compute_s == pytest.approx(expected)


@pytest.fixture(scope="module")
def unpacked_Bps() -> dict[str, float]:
    """How fast each scheme is unpacked here, measured quickly."""
    return probe_unpack("cpu", 0.01)


def test_unpacking_is_measured_for_every_scheme(unpacked_Bps: dict[str, float]) -> None:
    assert set(unpacked_Bps) == set(SCHEMES)


def test_the_best_is_the_fastest_that_fits(folder: Path) -> None:
    rows = looked_at(folder, Free(4 * GiB), 512, every=True)
    found = best(rows)
    assert found is not None
    assert (found.offload, found.form) == ("none", "none")
    assert best([row for row in rows if row.forecast is None]) is None


@pytest.mark.parametrize(("stored_s", "form"), [(1.2, "none"), (1.4, "nf4")])
def test_the_stored_format_is_best_unless_fewer_bits_are_much_faster(stored_s: float, form: str, folder: Path) -> None:
    """Fewer bits are another model: what they save must be worth it."""
    rows = looked_at(folder, Free(4 * GiB), 512)
    seconds = {"none": stored_s, "nf4": 1.0}
    timed = [replace(row, forecast=Forecast(seconds[row.form], 0.0, 0.0)) for row in rows]
    found = best(timed)
    assert found is not None
    assert found.form == form


def test_what_was_measured_is_used_and_the_rest_labelled() -> None:
    known = ceilings(MEASURED, "8:1", "cpu", "bf16")
    assert (known.disk_Bps, known.arithmetic.flops, known.assumed) == (2e9, 1e11, ())
    assert known.unpack_Bps == {"nf4": 5e8, "int8": 1e9, "int4": 2e9, "mxfp4": 4e8}
    guessed = ceilings(Speeds(), "8:1", "cuda", "bf16")
    assert guessed.assumed == ("disk", "link", "compute", "unpacking")
    assert ceilings(Speeds(), "8:1", "cpu", "f32").arithmetic == ASSUMED_CPU


@pytest.mark.parametrize("name", ["specexec", "torch", "processor", "threads", "everything"])
def test_arithmetic_that_was_measured_under_other_conditions_is_not_used_silently(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["plan", str(folder), "--gpu", "none", "--json"]
    slow = Arithmetic(1e6, 1e6)
    now = conditions("cpu")

    def planned(then: dict[str, str]) -> tuple[float, list[str], list[str]]:
        speeds = Speeds({}, None, {"cpu/f32": slow}, "2026-01-01", dict.fromkeys(map("cpu/{}".format, SCHEMES), 1e9))
        save_speeds(replace(speeds, conditions={"cpu": then} if then else {}))
        assert main(run) == 0
        record = json.loads(capsys.readouterr().out)
        return record["rows"][0]["sweep_s"], record["speeds"]["assumed"], record["speeds"]["changed"]

    used_s, assumed, changed = planned(now)
    assert (assumed, changed) == (["disk"], [])
    assumed_s, assumed, changed = planned({} if name == "everything" else now | {name: "another"})
    assert assumed == ["disk", "compute", "unpacking"]
    assert used_s > 100 * assumed_s
    then = "unknown" if name == "everything" else "another"
    assert changed == [f"{one} {then}, now {now[one]}" for one in now if name in (one, "everything")]
    assert main(run[:-1]) == 0
    out = capsys.readouterr().out
    assert f"Measured arithmetic is not used; it was measured with {'; '.join(changed)}." in out
    assert "Assumed, not measured: disk, compute, unpacking. `specexec doctor` measures them." in out
    assert main(["doctor", "--quick"]) == 0
    assert f"! speeds       arithmetic was measured with {changed[0]}" in capsys.readouterr().out


def test_another_gpu_is_not_as_fast_as_the_one_that_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = ((16, 1e-3), (512, 1e-2))
    save_speeds(Speeds({}, 1e9, {"cuda/f32": Arithmetic(1e6, 1e6, curve)}, "now", {}, {"cuda": conditions("cuda")}))
    found = []
    for gpu in ("12GiB", "4090"):
        assert main(["plan", str(folder), "--gpu", gpu, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"][0]["sweep_s"])
    assert found[0] > 3 * found[1]


def test_speeds_survive_the_file_and_damage_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_speeds(MEASURED, tmp_path / "a" / "speeds.json")
    assert load_speeds(file) == MEASURED
    assert load_speeds(tmp_path / "nothing") == Speeds()
    assert not caplog.records
    for damage in ("[]", "{", '{"disks": {"1": {}}}'):
        file.write_text(damage)
        assert load_speeds(file) == Speeds()
    assert caplog.text.count("run `specexec doctor` to measure again") == 3


@given(st.floats(0.3, 10), st.floats(0.3, 10), st.floats(0.5, 1), st.floats(0.5, 1))
def test_a_cpu_that_reads_and_computes_at_once_is_slower_at_both(
    disk_s: float, compute_s: float, compute: float, disk: float
) -> None:
    placement = place(Need((GiB,), (GiB,), 0, 0, 0, 0, 1), Free(4 * GiB), "disk")
    flops = Arithmetic(1e30, GiB / compute_s)
    limits = replace(KNOWN, disk_Bps=GiB / disk_s, arithmetic=flops, contention=Contention(compute, disk))
    # Both begin; when one is done the other goes on at full speed.
    together_s = min(disk_s / disk, compute_s / compute)
    rest_s = max(disk_s - together_s * disk, compute_s - together_s * compute)
    told = forecast(placement, Work(GiB, 2), limits, 16)
    assert told.sweep_s == pytest.approx(together_s + rest_s)


def test_the_measured_way_of_reading_is_the_one_that_is_used(tmp_path: Path) -> None:
    assert reading_for(tmp_path / "not" / "yet") == SAFE
    best_way = Reading(1 << 20, 3, False)
    save_speeds(Speeds({disk_key(tmp_path): Disk(1e9, best_way)}))
    assert reading_for(tmp_path) == best_way
    tiny("llama", tmp_path / "m")
    loaded = stream_of(load(tmp_path / "m", "disk", ctx=64)).placement.need
    assert need_of(open_folder(tmp_path / "m"), 4, 64).scratch_B == loaded.scratch_B, "a plan counts its buffers too"


def test_direct_reads_win_unless_plain_ones_are_worth_the_page_cache() -> None:
    direct, plain = Reading(4 << 20, 1, True), Reading(4 << 20, 1, False)
    assert choose([Trial(plain, 1.1e9), Trial(direct, 1e9)]).reading == direct
    assert choose([Trial(plain, 1.2e9), Trial(direct, 1e9)]).reading == plain


def test_several_threads_read_unless_one_is_clearly_faster() -> None:
    one, several = Reading(4 << 20, 1, True), Reading(4 << 20, 4, True)
    assert choose([Trial(one, 1.1e9), Trial(several, 1e9)]).reading == several
    assert choose([Trial(one, 1.2e9), Trial(several, 1e9)]).reading == one


def test_a_disk_is_probed_with_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.measure.SAMPLE_B", 32 << 20)
    found = probe_disk(write_sample(tmp_path), seconds=0.01)
    assert found.Bps > 1e6
    assert found.reading in READINGS


def test_disk_and_arithmetic_leave_each_other_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "sample"
    file.write_bytes(bytes(8 << 20))
    alone = Disk(1e9, Reading(1 << 20, 1, True))
    found = probe_contention(file, alone, "f32", seconds=0.05)
    assert 0 < found.contention.compute <= 1
    assert 0 < found.contention.disk <= 1
    assert replace(found, contention=ALONE) == alone
    kept = tmp_path / "speeds.json"
    save_speeds(Speeds({"8:1": found}), kept)
    assert load_speeds(kept).disks["8:1"] == found


def test_doctor_gives_rows_and_keeps_what_it_measured(
    unpacked_Bps: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("offload.measure.SAMPLE_B", 16 << 20)
    monkeypatch.setattr("offload.measure.probe_disk", lambda file: probe_disk(file, 0.2))
    monkeypatch.setattr(
        "offload.measure.probe_contention", lambda file, disk, dtype: probe_contention(file, disk, dtype, 0.2)
    )
    monkeypatch.setattr("offload.measure.probe_arithmetic", lambda *_: Arithmetic(1e11, 1e10))
    monkeypatch.setattr("offload.measure.probe_unpack", lambda _: unpacked_Bps)
    assert main(["doctor", "--path", str(tmp_path), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"system", "RAM", "GPU", "disk space", "packages", "disk", "cpu int8", "kept"} <= set(checks)
    assert way("cpu") in checks["cpu int8"]["found"]
    assert all(check["status"] == "ok" or check["fix"] for check in checks.values())
    assert load_speeds().arithmetic["cpu/bf16"] == load_speeds().arithmetic["cpu/int8"] == Arithmetic(1e11, 1e10)
    assert min(load_speeds().unpack_Bps[f"cpu/{scheme}"] for scheme in SCHEMES) > 1e6
    assert not list(tmp_path.glob(".specexec-probe*"))
    assert main(["doctor", "--quick"]) == 0
    quick = capsys.readouterr().out
    assert "✓ packages" in quick
    assert "✓ speeds" in quick


def test_headers_of_the_demo_are_listed_without_a_network() -> None:
    listed = list_model("demo", offline=True)
    assert work_of(listed, "none", item_B(listed)).weights_B > 1 << 20


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, failure: Exception | None = None) -> None:
    """A Hub that knows one repository, by its headers."""
    import huggingface_hub
    from huggingface_hub import ModelInfo
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata, TensorInfo

    def metadata(_: object, repo: str, name: str, revision: str | None = None) -> SafetensorsFileMetadata:
        if failure:
            raise failure
        tensors = {
            name: TensorInfo(
                entry.dtype,  # type: ignore[arg-type]  # the same words
                list(entry.shape),
                (entry.offset, entry.offset + entry.nbytes),
            )
            for name, entry in open_folder(folder).entries.items()
        }
        return SafetensorsFileMetadata({}, tensors)

    told = ModelInfo(id="some/model", siblings=[{"rfilename": file.name} for file in folder.iterdir()])
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: told)
    monkeypatch.setattr("offload.hub.headers_only.remote_json", lambda repo, revision, name: read_json(folder / name))


def test_a_model_on_the_hub_is_planned_like_the_same_one_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(monkeypatch, folder)
    assert main(["plan", "some/model", "--json", "--ram", "4GiB"]) == 0
    remote = json.loads(capsys.readouterr().out)
    assert main(["plan", str(folder), "--json", "--ram", "4GiB"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert remote["rows"] == here["rows"]
    assert main(["plan", "some/model", "--offline"]) == 3
    assert "--offline" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [ConnectionError("no route to host"), httpx.ConnectError("no route to host")])
def test_a_hub_out_of_reach_is_said_with_a_way_out(
    failure: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(monkeypatch, folder, failure)
    assert main(["plan", "some/model"]) == 3
    said = capsys.readouterr().err
    assert "some/model is not in the local cache" in said
    assert "no route to host" in said


@pytest.mark.parametrize(
    ("gpu", "name", "memory_GiB"),
    [
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB", 16),
        ("4060ti", "RTX 4060 Ti 8GB", 8),
        ("5080", "RTX 5080", 16),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super", 16),
        ("a100-80gb", "A100 80GB", 80),
        ("4090 48GB", "RTX 4090 48GB", 48),
        ("24GiB", "a GPU", 24),
    ],
)
def test_a_gpu_is_the_one_that_was_named(
    gpu: str, name: str, memory_GiB: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder), "--gpu", gpu, "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert (machine["device"], machine["vram_B"]) == (name, memory_GiB * GiB)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--gpu", "5085"], "'5085' is no size and none of 5080"),
        (["--gpu", "24"], "did you mean 24GiB?"),
        (["--gpu", "RTX 4090 Laptop"], "none of 3060"),
        (["--ram", "24"], "'24' has no unit; did you mean 24GiB?"),
        (["--disk", "3"], "'3' has no unit; did you mean 3GB/s?"),
        (["--budget", "9999999"], "9999999 is not in the range 0<=x<=4096"),
    ],
)
def test_a_quantity_that_means_something_else_is_refused(
    asked: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder), *asked]) == 2
    assert says in capsys.readouterr().err
