"""The effect of every option is visible in --json: each is changed alone, and the record must say so."""

from __future__ import annotations

import io
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click
import pytest

from cli.app import main
from cli.batch.cluster import Cluster
from cli.batch.command import generate
from cli.bench.check import check as check_command
from cli.bench.command import bench
from cli.bench.eval import evaluate
from cli.chat.command import chat
from cli.distill.head import head
from cli.distill.model import model as model_command
from cli.distill.record import record
from cli.models.doctor import doctor
from cli.models.pack import pack
from cli.models.plan import plan
from cli.models.pull import pull
from cli.serve.command import serve
from cli.serve.models import Models
from offload.checkpoint.headers import open_folder
from offload.hub.names import demo_folder
from tests.adapters import adapter
from tests.fake_engine import FakeEngine

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
Command = Callable[..., "Json"]

QUERIES = "model.layers.0.self_attn.q_proj"
Changes = dict[str, tuple[list[str], str]]

# Options → how they are typed, and where in the record their effect stands.
SAMPLING: Changes = {
    "temperature": (["--temperature", "0.9"], "sampling.temperature"),
    "top_p": (["--top-p", "0.5"], "sampling.top_p"),
    "top_k": (["--top-k", "3"], "sampling.top_k"),
    "min_p": (["--min-p", "0.3"], "sampling.min_p"),
    "repetition_penalty": (["--repetition-penalty", "1.4"], "sampling.repetition_penalty"),
    "presence_penalty": (["--presence-penalty", "1"], "sampling.presence_penalty"),
    "frequency_penalty": (["--frequency-penalty", "1"], "sampling.frequency_penalty"),
    "seed": (["--seed", "2"], "sampling.seed"),
    "ignore_eos": (["--ignore-eos"], "sampling.ignore_eos"),
    "max_tokens": (["--max-tokens", "2"], "sampling.max_tokens"),
    "stop": (["--stop", "zzz"], "sampling.stop"),
}
PLACED: Changes = {
    "drafter": (["--drafter", "none"], "engine.sources"),
    "device": (["--device", "cpu"], "engine.asked.device"),
    "dtype": (["--dtype", "f32"], "engine.dtype"),
    "ctx": (["--ctx", "512"], "engine.context"),
    "offload": (["--offload", "disk"], "engine.placement.offload"),
    "vram": (["--vram", "8GiB"], "engine.asked.vram"),
    "link_limit": (["--link-limit", "400MB/s"], "engine.link_limit_Bps"),
    "exact": (["--exact"], "engine.exact"),
    "offline": (["--offline"], "engine.asked.offline"),
    "verify": (["--verify"], "engine.verified"),
    "trust_remote_code": (["--trust-remote-code"], "engine.asked.trust_remote_code"),
}
TOLD: Changes = {
    "template_vars": (["--template-var", "name=3"], "engine.asked.template_vars"),
    "allow_control_tokens": (["--allow-control-tokens"], "engine.asked.allow_control_tokens"),
    "prefix_cache": (["--prefix-cache"], "engine.asked.prefix_cache"),
}
# What of an engine is told by every command that loads one; the runs of CHAT look at each effect alone.
ENGINE: tuple[Changes, ...] = (
    {
        **PLACED,
        "budget": (["--budget", "3"], "engine.budget"),
        "model": (["--model", "{int8}"], "engine.folders.target"),
        "compute": (["--compute", "int8"], "engine.compute"),
        "kv_quant": (["--kv-quant", "8"], "engine.kv_quant"),
        "kv": (["--kv", "disk"], "engine.placement.caches.disk"),
    },
    {
        "drafter_device": (["--drafter-device", "cpu"], "engine.asked.drafter_device"),
        "drafter_quant": (["--drafter-quant", "nf4"], "engine.placement.ram_parts_B.drafter"),
        "head_quant": (["--head-quant", "nf4"], "engine.placement.ram_parts_B.head"),
        "draft_vocab": (["--draft-vocab", "1k"], "engine.asked.draft_vocab"),
        "draft_window": (["--draft-window", "64"], "engine.asked.draft_window"),
        "lora": (["--lora", "{target}"], "engine.adapters.target"),
        "drafter_lora": (["--drafter-lora", "{drafter}"], "engine.adapters.drafter"),
        "ram": (["--ram", "60MB"], "engine.asked.ram"),
    },
)
CHAT: tuple[Changes, ...] = (
    {
        **SAMPLING,
        **TOLD,
        "max_tokens": (["--max-tokens", "2"], "completion_tokens"),
        "prompt": (["--prompt", "What is a drafter?"], "prompt"),
        "system": (["--system", "Answer in one word."], "system"),
        "think": (["--think", "on"], "think"),
        "on_full": (["--on-full", "summarise"], "on_full"),
        "positional_model": (["{tiny}"], "engine.folders.target"),
    },
    PLACED,
    {"budget": (["--budget", "3"], "drafted"), "stop": (["--stop", "drafter"], "finish_reason")},
    {"schema": (["--schema", '{"enum": ["words"]}'], "text")},
    {"grammar": (["--grammar", 'root ::= "words"'], "text")},
    {
        "model": (["--model", "{int8}"], "engine.folders.target"),
        "compute": (["--compute", "int8"], "engine.compute"),
    },
    {"kv_quant": (["--kv-quant", "4"], "engine.kv_quant")},
    {"kv": (["--kv", "disk"], "engine.placement.cache_disk_B")},
    {"drafter_quant": (["--drafter-quant", "nf4"], "engine.placement.ram_parts_B.drafter")},
    {"head_quant": (["--head-quant", "nf4"], "engine.asked.head_quant")},
    {"draft_vocab": (["--draft-vocab", "1k"], "engine.placement.ram_parts_B.drafter")},
    {
        "drafter_device": (["--drafter-device", "cpu"], "engine.asked.drafter_device"),
        "draft_window": (["--draft-window", "64"], "engine.placement.ram_parts_B.drafter"),
    },
    {
        "lora": (["--lora", "{target}"], "engine.adapters.target"),
        "drafter_lora": (["--drafter-lora", "{drafter}:0.5"], "engine.adapters.drafter"),
    },
    {"ram": (["--ram", "40MB"], "engine.placement.ram_B")},
)
GENERATE: Changes = {
    "split": (["--split", "lines"], "0.id"),
    "field": (["--field", "text"], "-1.prompt_sha"),
    "template": (["--template", "{{ text }}!"], "0.prompt_sha"),
    "system": (["--system", "Be brief."], "0.prompt_sha"),
    "chat": (["--raw"], "0.prompt_sha"),
    "limit": (["--limit", "1"], "-1.id"),
    "shard": (["--shard", "2/2"], "0.id"),
    "dedupe": (["--dedupe"], "1.duplicate_of"),
    "on_too_long": (["--on-too-long", "skip"], "-1.id"),
    "strict": (["--strict"], "0.run.strict"),
    "think": (["--think", "on"], "0.run.think"),
    "parallel": (["--parallel", "3"], "0.run.parallel"),
    "engine": (["--engine", "ray"], "0.engine.workers"),
    "ray_address": (["--engine", "ray", "--ray-address", "auto"], "0.run.ray_address"),
    "workers": (["--engine", "ray", "--workers", "3"], "0.engine.workers"),
    **{name: (typed, f"0.{place}") for name, (typed, place) in TOLD.items()},
    "output_format": (["--output-format", "openai-batch"], "0.custom_id"),
    "dry_run": (["--dry-run"], "0.items"),
    "prompts": (["-p", "one more"], "0.id"),
}
BENCH: tuple[Changes, ...] = (
    {
        "budgets": (["--budgets", "4"], "1.budget"),
        "temperatures": (["--temperatures", "0.9"], "1.temperature"),
        "drafters": (["--drafters", "sibling"], "1.asked"),
        "offloads": (["--offloads", "ram"], "1.offload"),
        "planners": (["--planners", "beam"], "1.planner"),
        "limit": (["--limit", "2"], "1.run.limit"),
        "repeat": (["--repeat", "2"], "1.run.repeat"),
        "gen": (["--gen", "3"], "1.run.gen"),
        "rules": (["--rules", "walk"], "2.planner"),
        "file": (["--prompts", "{prompts}"], "1.run.prompts"),
    },
    {"budget": (["--budget", "3"], "1.budget"), "drafter": (["--drafter", "ngram"], "1.drafter"),
     "offload": (["--offload", "disk"], "1.offload"), "planner": (["--planner", "beam"], "1.planner")},
)  # fmt: skip
EVAL: Changes = {
    "tasks": (["--tasks", "b"], "specexec.asked.tasks"),
    "include": (["--include", "."], "specexec.asked.include"),
    "num_fewshot": (["--num-fewshot", "2"], "specexec.asked.num_fewshot"),
    "limit": (["--limit", "3"], "specexec.asked.limit"),
    "chat": (["--chat"], "specexec.asked.chat"),
    "seed": (["--seed", "4"], "specexec.asked.seed"),
    "cache": (["--cache", "{tiny}-cache"], "specexec.asked.cache"),
    "allow_code": (["--allow-code"], "specexec.asked.allow_code"),
}
RECORD: Changes = {
    "top": (["--top", "3"], "top"),
    "layers": (["--layers", "1,2"], "layers"),
    "chat": (["--raw"], "chat"),
    "split": (["--split", "blank"], "split"),
    "limit": (["--limit", "1"], "prompts"),
}
TRAINING: Changes = {
    "epochs": (["--epochs", "2"], "epochs"),
    "batch": (["--batch", "9"], "batch"),
    "length": (["--length", "8"], "length"),
    "rate": (["--rate", "0.001"], "rate"),
    "loss": (["--loss", "tv"], "loss"),
    "seed": (["--seed", "2"], "seed"),
    "device": (["--device", "cpu"], "device"),
}
# What only says how something is shown or kept, and where conversations and finished answers come from.
SHOWN = {
    "inputs", "output", "output_dir", "overwrite", "retry_failed", "form", "plot", "samples",
    "resume", "session", "no_save", "no_history", "bell", "notify_command", "as_json", "quiet", "verbose", "log_file",
    "log_json", "color", "markdown", "plain", "hide_thinking", "stats", "tree",
    "preset", "connect", "api_key",  # test_presets.py and test_connect.py tell what came of them
    "mcp", "mcp_allow", "mcp_timeout", "yes",  # test_mcp.py does
    "lossy",  # test_lossy_cli.py does; what needs exact texts refuses it
}  # fmt: skip
PLAN: Changes = {
    "gpu": (["--gpu", "4090"], "machine.device"),
    "link": (["--link", "3GB/s"], "speeds.link_Bps"),
    "disk": (["--disk", "5GB/s"], "speeds.disk_Bps"),
    "ram": (["--ram", "3GiB"], "machine.ram_B"),
    "vram": (["--vram", "3GiB"], "machine.vram_B"),
    "ctx": (["--ctx", "512"], "rows.0.ram_B"),
    "budget": (["--budget", "8"], "rows.0.ram_B"),
    "drafter": (["--drafter", "demo"], "rows.0.ram_B"),
    "drafter_device": (["--drafter-device", "cpu"], "asked.drafter_device"),
    "drafter_quant": (["--drafter-quant", "nf4"], "asked.drafter_quant"),
    "draft_window": (["--draft-window", "64"], "asked.draft_window"),
    "head_quant": (["--head-quant", "nf4"], "rows.0.ram_B"),
    "compute": (["--compute", "int8"], "rows.0.quant"),
    "kv_quant": (["--kv-quant", "4"], "rows.0.ram_B"),
    "kv": (["--kv", "disk"], "rows.0.cache_disk_B"),
    "lora": (["--lora", "{tiny-lora}"], "rows.0.ram_B"),
    "drafter_lora": (["--drafter", "demo", "--drafter-lora", "{drafter}"], "asked.drafter_lora"),
    "every": (["--all"], "rows.4.quant"),
    "offline": (["--offline"], "asked.offline"),
    "trust_remote_code": (["--trust-remote-code"], "asked.trust_remote_code"),
}
PACK: Changes = {
    "quant": (["--quant", "none"], "size_B"),
    "head_quant": (["--head-quant", "nf4"], "head_quant"),
    "out": (["--out", "{tiny}-other"], "out"),
    "device": (["--device", "cuda"], "device"),
    "offline": (["--offline"], "offline"),
    "trust_remote_code": (["--trust-remote-code"], "trust_remote_code"),
    "dry_run": ([], "dry_run"),
}

SERVE: Changes = {
    **TOLD,
    "host": (["--host", "127.0.0.2"], "base_url"),
    "api_key": (["--api-key", "secret"], "api_key"),
    "allowed_host": (["--allowed-host", "gpu.lan"], "allowed_hosts"),
    "cors_origin": (["--cors-origin", "https://chat.example"], "cors_origins"),
    "served_name": (["--served-name", "mine"], "models"),
    "loaded": (["--loaded", "2"], "loaded"),
    "idle_unload": (["--idle-unload", "600"], "idle_unload_s"),
    "parallel": (["--parallel", "2"], "parallel"),
    "max_queue": (["--max-queue", "3"], "max_queue"),
    "request_timeout": (["--request-timeout", "30"], "request_timeout_s"),
    "sse_keepalive": (["--sse-keepalive", "2"], "sse_keepalive_s"),
    "sse_keepalive_mode": (["--sse-keepalive-mode", "empty-delta"], "sse_keepalive_mode"),
    "think": (["--think", "on"], "think"),
    "positional_model": (["{tiny}"], "engine.folders.target"),
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effects") / "tiny"
    shutil.copytree(demo_folder("target"), folder)
    assert main(["pack", str(folder), "--quant", "int8", "--out", str(folder.with_name("int8")), "-q"]) == 0
    for name, model in {"tiny-lora": folder, **{role: demo_folder(role) for role in ("target", "drafter")}}.items():
        O, I = open_folder(model).entries[f"{QUERIES}.weight"].shape
        adapter(folder.with_name(name), {QUERIES: (O, I)})
    return folder


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: str) -> Json:
        monkeypatch.setattr("sys.stdin", io.StringIO())
        capsys.readouterr()
        assert main([*arguments]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        try:
            found: Json = json.loads(out)
        except json.JSONDecodeError:
            found = [json.loads(line) for line in out.splitlines()]
        return found

    return run


def at(record: Json, path: str) -> Json:
    """What stands there; None where nothing does."""
    for key in path.split("."):
        if isinstance(record, list):
            record = record[int(key)]
        else:
            assert isinstance(record, dict)
            record = record.get(key)
    return record


def options_of(command: click.Command) -> set[str]:
    return {str(parameter.name) for parameter in command.params} - {"help"}


def check(printed: Command, base: list[str], changes: Changes, folder: Path, within: str = "") -> None:
    before = printed(*base)
    names = ("int8", "target", "drafter", "tiny-lora")
    places = {"{tiny}": str(folder)} | {f"{{{name}}}": str(folder.with_name(name)) for name in names}
    typed = [part for arguments, _ in changes.values() for part in arguments]
    for name, place in places.items():
        typed = [part.replace(name, place) for part in typed]
    after = printed(*base, *typed)
    silent = {name for name, (_, path) in changes.items() if at(before, within + path) == at(after, within + path)}
    assert silent == set()


def test_every_option_is_in_the_table() -> None:
    # What came of images test_images.py tells, on models that see.
    assert options_of(chat) == {"images"} | {name for run in CHAT for name in run} | SHOWN & options_of(chat)
    assert options_of(plan) - SHOWN - {"model"} == PLAN.keys()
    assert options_of(pack) - SHOWN - {"model"} == PACK.keys()
    engine = {name for run in ENGINE for name in run}
    assert options_of(generate) == engine | SAMPLING.keys() | GENERATE.keys() | SHOWN & options_of(generate)
    assert options_of(check_command) == engine | SAMPLING.keys() | {"file", "limit"} | SHOWN & options_of(check_command)
    assert options_of(bench) == engine | {name for run in BENCH for name in run} | SHOWN & options_of(bench)
    assert options_of(evaluate) == engine | EVAL.keys() | SHOWN & options_of(evaluate)
    assert options_of(record) == engine | SAMPLING.keys() | RECORD.keys() | {"prompts"} | SHOWN & options_of(record)
    assert options_of(head) - SHOWN == TRAINING.keys() | {"recorded", "kind", "draft_vocab"}
    assert options_of(model_command) - SHOWN == TRAINING.keys() | {"recorded", "small", "offline"}
    assert options_of(serve) == engine | SERVE.keys() | {"port", "uds"} | SHOWN & options_of(serve)
    # Of these test_cli_pull.py tells what came.
    told = {"name", "revision", "drafter", "quant", "head_quant", "out", "trust_remote_code", "dry_run", "offline"}
    assert options_of(pull) - SHOWN == told
    assert options_of(doctor) - SHOWN == {"quick", "path"}  # test_doctor_gives_rows_and_keeps_what_it_measured


@pytest.mark.parametrize("changes", CHAT, ids=lambda changes: next(iter(changes)))
def test_an_answer_says_what_came_of_every_option(changes: Changes, printed: Command, tiny_folder: Path) -> None:
    base = ["chat", "--json", "-p", "How does specexec work?", "-n", "6", "--seed", "1"]
    check(printed, base, changes, tiny_folder)


def test_a_plan_says_what_came_of_every_option(printed: Command, tiny_folder: Path) -> None:
    for name, change in PLAN.items():
        base = ["plan", str(tiny_folder), "--json", *(["--gpu", "8GiB"] if name in ("link", "vram") else [])]
        check(printed, base, {name: change}, tiny_folder)


def test_a_pack_says_what_came_of_every_option(printed: Command, tiny_folder: Path) -> None:
    base = ["pack", str(tiny_folder), "--json", "--dry-run", "--out", str(tiny_folder.with_name("packed"))]
    dry = {name: change for name, change in PACK.items() if name != "dry_run"}
    check(printed, base, dry, tiny_folder)
    written = printed(*(part for part in base if part != "--dry-run"))
    assert (at(printed(*base), "dry_run"), at(written, "dry_run")) == (True, False)
    assert isinstance(written, dict)
    assert "seconds" in written


BASES = {
    "generate": (["generate", "--json", "-p", "What is a tree?", "-n", "3", "--seed", "1"], ""),
    "check": (["check", "--json", "--limit", "1", "-n", "3", "--seed", "1"], ""),
    "bench": (["bench", "--json", "--limit", "1", "-r", "1", "-n", "2"], "1."),
    "eval": (["eval", "--json", "--tasks", "a"], "specexec."),
    "serve": (["serve", "--json", "--port", "0"], ""),
}


@pytest.fixture
def no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of `eval` without the tasks, which have tests of their own."""
    monkeypatch.setattr("cli.bench.eval._manager", lambda asked: None)
    monkeypatch.setattr("cli.bench.eval._found", lambda manager, asked: [])
    monkeypatch.setattr("cli.bench.eval._evaluate", lambda *_: {"results": {}})


@pytest.fixture
def served_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers leave when they are ready."""

    class Once:
        def __init__(self, app: object, models: Models, shutdown_s: int) -> None:
            self._models = models

        def run(self, sockets: object) -> None:
            self._models.start()
            while self._models.first.state == "loading":
                time.sleep(0.01)

    monkeypatch.setattr("cli.serve.running.Running", Once)


@pytest.mark.parametrize("command", BASES)
@pytest.mark.usefixtures("no_harness", "served_once")
def test_every_command_with_an_engine_says_what_came_of_its_options(
    command: str, printed: Command, tiny_folder: Path
) -> None:
    base, within = BASES[command]
    for changes in ENGINE:
        told = {name: change for name, change in changes.items() if (command, name) != ("bench", "budget")}
        check(printed, base, told, tiny_folder, within)


@pytest.mark.parametrize("command", ["generate", "check"])
def test_what_chooses_tokens_gets_every_prompt(command: str, printed: Command, tiny_folder: Path) -> None:
    base, within = BASES[command]
    check(printed, base, SAMPLING, tiny_folder, within)


@pytest.mark.parametrize("name", GENERATE)
def test_a_batch_says_what_came_of_every_option(
    name: str, tmp_path: Path, printed: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def no_cluster(opener: object, address: str | None, workers: int | Literal["auto"]) -> Iterator[Cluster]:
        cluster = Cluster(FakeEngine, 2 if workers == "auto" else workers, 0.0)
        monkeypatch.setattr(cluster, "batch", FakeEngine().batch)
        yield cluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cli.engine.open.open_engine", lambda options, **_: FakeEngine())
    monkeypatch.setattr("cli.batch.command.running_cluster", no_cluster)
    Path("a.txt").write_text("one\ntwo\n")
    Path("b.jsonl").write_text("".join(json.dumps({"prompt": p, "text": "t"}) + "\n" for p in ("x", "x", "y" * 150)))
    text, lines = ["a.txt"], ["b.jsonl"]
    inputs = lines if name in ("field", "limit", "shard", "dedupe", "on_too_long", "dry_run") else text
    base = ["generate", "--json", *inputs, "--seed", "1", *(["--ctx", "60"] if name == "on_too_long" else [])]
    base += ["--engine", "ray"] if name in ("ray_address", "workers") else []

    def listed(*arguments: str) -> Json:
        return found if isinstance(found := printed(*arguments), list) else [found]

    check(listed, base, {name: GENERATE[name]}, tmp_path)


@pytest.mark.parametrize("changes", BENCH, ids=["lists", "single"])
def test_a_table_of_measurements_says_what_came_of_every_option(
    changes: Changes, printed: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("One.\nTwo.\n")
    mine = {n: ([w.replace("{prompts}", str(tmp_path / "prompts.txt")) for w in a], p) for n, (a, p) in changes.items()}
    check(printed, BASES["bench"][0], mine, tiny_folder)


def test_making_a_drafter_says_what_came_of_every_option(printed: Command, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("One.\nTwo.\n")
    kept, other, made = (str(tmp_path / name) for name in ("kept", "other", "made"))
    changes = {**ENGINE[0], **SAMPLING, **RECORD, "output": (["-o", other], "output")}
    base = ["distill", "record", "--json", "--prompts", str(tmp_path / "prompts.txt"), "-o", kept, "-n", "9"]
    check(printed, [*base, "--seed", "1"], changes, tiny_folder)
    again = {"overwrite": (["--overwrite"], "overwrite")}
    taught = ["distill", "head", kept, "--json", "-o", made, "--epochs", "1"]
    own: Changes = {
        "draft_vocab": (["--draft-vocab", "1k"], "draft_vocab"), "kind": (["--kind", "dflash"], "kind")
    }  # fmt: skip
    check(printed, taught, {**TRAINING, **again, **own}, tiny_folder)


def test_a_list_and_one_of_it_are_not_both_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--drafters", "none,ngram", "--drafter", "sibling"]) == 2
    assert "--drafter is one of --drafters" in capsys.readouterr().err


def test_an_exactness_check_says_which_prompts_it_took(printed: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("One.\nTwo.\n")
    run = ["check", "--json", "-n", "2", "--limit", "1"]
    built_in, mine, both = (
        printed(*run),
        printed(*run, "--prompts", str(tmp_path / "prompts.txt")),
        printed(*run[:-1], "2", "--prompts", str(tmp_path / "prompts.txt")),
    )
    assert at(built_in, "prompt") != at(mine, "prompt") == "One."
    assert at(both, "1.prompt") == "Two."


@pytest.mark.usefixtures("no_harness")
def test_scores_say_what_came_of_every_option(printed: Command, tiny_folder: Path) -> None:
    check(printed, BASES["eval"][0], EVAL, tiny_folder)


@pytest.mark.usefixtures("served_once")
def test_a_server_says_what_came_of_every_option(printed: Command, tiny_folder: Path, tmp_path: Path) -> None:
    base = BASES["serve"][0]
    check(printed, base, SERVE, tiny_folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    told = printed(*base[:-1], str(port))
    assert (at(told, "base_url"), at(told, "socket")) == (f"http://127.0.0.1:{port}/v1", None)
    told = printed(*base, "--uds", str(tmp_path / "s"), "--api-key", "secret")
    assert (at(told, "base_url"), at(told, "socket")) == ("http://localhost/v1", str(tmp_path / "s"))
    assert "secret" not in json.dumps(told)
