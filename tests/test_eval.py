"""Scores of lm-evaluation-harness: the same as by the harness's own HFLM on the same weights, in fewer sweeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specexec
from cli.app import main
from offload.hub.names import demo_folder
from specexec.engine.engine import Engine
from specexec.errors import BadSampling, ContextLengthExceeded

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports warn about each other

CONTEXT = 64
SUMS = [("one plus two", ["three", "four", "fourteen sheep"], 0), ("two plus two", ["one", "four", "five"], 1)] * 3
STORIES = ["Once upon a time there was a loop.", "def main():\n    return 0\n" * 20, "a"]
ASKED = """
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
doc_to_text: "What is {{question}}?"
"""
TASKS = {
    "sums": ASKED
    + """
fewshot_split: test
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "stories": """
dataset_kwargs: {data_files: {test: FOLDER/stories.jsonl}}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "answers": ASKED
    + """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tasks that need no network: two files of data and three of YAML."""
    folder = tmp_path_factory.mktemp("tasks")
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    sums = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in SUMS]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + text.replace("FOLDER", str(folder)))
    return {name: str(folder / f"{name}.yaml") for name in TASKS}


@pytest.fixture(scope="module")
def llm() -> Iterator[Engine]:
    with specexec.load("demo", ctx=CONTEXT, dtype="f32") as engine:
        yield engine


@pytest.fixture(scope="module")
def hflm() -> Any:
    """The harness's own model, on the same weights."""
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(demo_folder("target"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder("target"))
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT, device="cpu")


def ours(llm: Engine) -> Any:
    from specexec.evaluation.lm_eval import SpecExecLM

    return SpecExecLM(llm)


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, one, index) for index, one in enumerate(arguments)]


PAIRS = [
    ("What is one plus two?", " three"),
    ("What is one plus two?", " four and more"),
    ("What is one plus two? ", "three"),  # the space belongs to what is asked about
    ("", "Once upon a time"),
    ("word " * 200, "and the end"),  # cut from the left
    ("What is one plus two?", " three"),
]


def test_likelihoods_are_those_of_the_harnesss_own_model(llm: Engine, hflm: Any) -> None:
    found = ours(llm).loglikelihood(asked(*PAIRS), disable_tqdm=True)
    expected = hflm.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    assert [log_prob for log_prob, _ in found] == pytest.approx([log_prob for log_prob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_whole_texts_are_scored_in_the_same_windows(llm: Engine, hflm: Any) -> None:
    texts = asked(*[(text,) for text in STORIES])
    assert len(llm.encode(STORIES[1])) > 2 * CONTEXT, "or there is only one window"
    found = ours(llm).loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(hflm.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3)


def test_answers_are_those_of_the_harnesss_own_model(llm: Engine, hflm: Any) -> None:
    wishes = [{"until": ["\n", "."], "max_gen_toks": 20}, {"until": "e", "max_gen_toks": 8}, {"max_gen_toks": 10}]
    requests = asked(*[(text, wish) for text in ("Once upon", "def main", "long " * 90) for wish in wishes])
    found = ours(llm).generate_until(requests, disable_tqdm=True)
    assert found == hflm.generate_until(requests, disable_tqdm=True)
    assert any(found)


def test_sampled_answers_are_a_function_of_the_seed(llm: Engine) -> None:
    from specexec.evaluation.lm_eval import SpecExecLM

    requests = asked(*[("Once", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8})] * 3)
    first, again, other = (SpecExecLM(llm, seed).generate_until(requests, disable_tqdm=True) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 3, "repeats of one request are different draws"


def test_what_a_task_asks_for_and_we_lack_is_refused(llm: Engine) -> None:
    with pytest.raises(BadSampling, match="num_beams"):
        ours(llm).generate_until(asked(("Once", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(ContextLengthExceeded, match="answers of 64 tokens"):
        ours(llm).generate_until(asked(("Once", {"max_gen_toks": CONTEXT})), disable_tqdm=True)
    with pytest.raises(ContextLengthExceeded, match="at once"):
        ours(llm).loglikelihood(asked(("Once", " word" * 200)), disable_tqdm=True)


def test_local_tasks_get_the_harnesss_own_scores(
    tasks: dict[str, str], hflm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    output = tmp_path / "scores.json"
    run = ["eval", "--tasks", ",".join(tasks.values()), "--num-fewshot", "1", "--limit", "5", "--dtype", "f32"]
    assert main([*run, "--ctx", str(CONTEXT), "--json", "-o", str(output), "--samples"]) == 0
    printed = json.loads(capsys.readouterr().out)["results"]
    manager = TaskManager(include_defaults=False)
    truth = simple_evaluate(hflm, tasks=[*tasks.values()], task_manager=manager, num_fewshot=1, limit=5)["results"]
    assert printed.keys() == truth.keys() == TASKS.keys()
    for task, scores in truth.items():
        numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: printed[task][name] for name in numbers}, rel=1e-3), task
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["config"]["model"] == "demo"
    assert len(written["samples"]["sums"]) == 5


def test_a_table_is_printed_and_nothing_else(
    tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no git repository
    assert main(["-q", "eval", "--tasks", tasks["sums"], "--chat"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("|Tasks|Version|Filter|n-shot| Metric |")
    assert "|acc_norm|" in out
    assert err == ""


def test_an_evaluation_that_was_stopped_goes_on(
    tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["eval", "--tasks", tasks["sums"], "--json", "--cache", str(tmp_path / "cache")]
    computed: list[int] = []
    whole = Engine.likelihoods

    def stopped(self: Engine, wanted: Any) -> Iterator[Any]:
        for number, found in enumerate(whole(self, wanted)):
            computed.append(number)
            if len(computed) == 7:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Engine, "likelihoods", stopped)
    assert main(run) == 130
    capsys.readouterr()
    assert main(run) == 0
    kept = json.loads(capsys.readouterr().out)["results"]
    assert len(computed) <= 7 + 3 * len(SUMS) - 6, "six were kept"
    monkeypatch.undo()
    assert main(run[:-2]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == kept


def test_a_task_that_does_not_exist_is_said_before_loading(
    tasks: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks as harness

    class Small(harness.TaskManager):
        """Without the harness's own tasks, which take long to list."""

        def __init__(self, include_path: object, include_defaults: bool) -> None:
            assert include_defaults != (names == "missing.yaml")
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", Small)
    monkeypatch.setattr("cli.engine.open.open_engine", lambda options, **_: pytest.fail("nothing should be loaded"))
    include = ["--include", str(Path(tasks["sums"]).parent)]
    for names, says in [("missing.yaml", "there is no task file missing.yaml"), ("summs", "Try: sums.")]:
        assert main(["eval", "--tasks", names, *include]) == 3
        assert says in capsys.readouterr().err


def test_offline_no_data_is_looked_for_on_the_hub(tmp_path: Path) -> None:
    task = tmp_path / "far.yaml"
    task.write_text("task: sums\ndataset_path: somebody/sums\ntest_split: test\n")
    asked = [sys.executable, "-c", "import cli.app; raise SystemExit(cli.app.main())", "eval", "--tasks", str(task)]
    refused = {**os.environ, "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    ran = subprocess.run([*asked, "--offline"], capture_output=True, text=True, env=refused)
    assert (ran.returncode, "cannot be loaded" in ran.stderr, "Retrying" in ran.stderr) == (3, True, False), ran.stderr


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.bench.eval.find_spec", lambda name: None)
    assert main(["eval", "--tasks", "arc_easy"]) == 2
    assert "pip install 'specexec[eval]'" in capsys.readouterr().err


def test_results_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.json").write_text("{}")
    assert main(["eval", "--tasks", "arc_easy", "-o", str(tmp_path / "old.json")]) == 9
    assert main(["eval", "--tasks", "arc_easy", "--samples"]) == 2


def test_a_place_that_takes_no_results_is_said_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["eval", "--tasks", "arc_easy", "-o", str(tmp_path / "new" / "scores.json")]
    monkeypatch.setattr("cli.bench.eval._manager", lambda asked: pytest.fail("no task should be looked for"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(run) == 3
    assert "scores.json: nothing can be written there" in capsys.readouterr().err
