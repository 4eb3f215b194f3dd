"""`specexec eval`: tasks of lm-evaluation-harness, answered by an engine; the harness words and scores them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.batch.output.files import replace_file
from cli.engine.facts import facts_of
from cli.engine.open import running_engine
from cli.engine.revision import fingerprint
from cli.shared.control_codes import echo
from cli.shared.errors import MissingExtra, OutputFileExists, TaskNotFound
from cli.shared.options import EngineOptions, WholeNumber, engine_options
from cli.shared.verbosity import Verbosity, json_option, start_logging, verbosity_options
from cli.terminal.screen import Screen

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
TASK_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class EvalRequest:
    """Which tasks, and how they are put to the model."""

    tasks: tuple[str, ...]
    include: Path | None
    num_fewshot: int | None
    limit: int | None
    chat: bool
    seed: int
    allow_code: bool


@click.command("eval", short_help="Score the model on tasks of lm-evaluation-harness.")
@click.option("--tasks", required=True, metavar="A,B,…", help="Names, patterns such as mmlu_*, or .yaml files.")
@click.option("--include", type=_FOLDER, help="A folder with more task files.")
@click.option("--num-fewshot", type=WholeNumber(min=0), show_default="the task's own", help="Worked examples.")
@click.option("--limit", type=WholeNumber(min=1), help="Only the first N documents of each task.")
@click.option("--chat/--raw", default=False, help="Apply the chat template, or put the text as it is.")
@click.option("--seed", type=WholeNumber(min=0), default=0, help="For tasks that sample.")
@click.option("--cache", type=_FILE, help="Keep answers here; the same command again continues after a stop.")
@click.option("--allow-code", is_flag=True, help="Allow tasks that run the code which the model writes.")
@click.option("-o", "--output", type=_FILE, help="Write everything the harness reports to this file, as JSON.")
@click.option("--samples", is_flag=True, help="With every single answer in that file.")
@json_option("Print the results, and what came of every option, as JSON.")
@engine_options
@verbosity_options
@click.pass_obj
def evaluate(
    verbosity: Verbosity, engine_options: EngineOptions, tasks: str, include: Path | None, num_fewshot: int | None,
    limit: int | None, chat: bool, seed: int, cache: Path | None, allow_code: bool, output: Path | None,
    samples: bool, as_json: bool,
) -> int:  # fmt: skip
    """Score the model on tasks of EleutherAI's lm-evaluation-harness (pip install 'specexec[eval]').

    Likelihoods need no drafter: as many texts as memory holds go into one sweep over the weights, and what they have
    in common (a question and its answers, worked examples) is computed once. Answers are drafted, and exact, as always.

    \b
      specexec eval --tasks lambada_openai,arc_easy --limit 100
      specexec eval --tasks my_task.yaml -m llama-70b --offload ram -o scores.json
    """
    if samples and output is None:
        raise click.UsageError("--samples go into a file: name it with -o.")
    if output is not None:
        _check_place(output)
    _check_extra()
    start_logging(verbosity)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # read when the harness imports tqdm
    if engine_options.load.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the harness imports what finds its data sets
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    asked = EvalRequest(names, include, num_fewshot, limit, chat, seed, allow_code)
    screen = Screen(quiet=verbosity.quiet)
    with screen.status(lambda: "looking for the tasks…"), _progress(verbosity):
        manager = _manager(asked)
        found = _found(manager, asked)
    with running_engine(engine_options, screen, verbosity) as llm:
        kept = None if cache is None else _cache_of(cache, llm, engine_options)
        with _progress(verbosity):
            results = _evaluate(manager, found, asked, llm, kept, samples)
        results["specexec"] = {"asked": asdict(asked) | {"cache": kept}, "engine": facts_of(llm, engine_options)}
    if output is not None:
        replace_file(output, _as_json(results) + "\n")
    shown = ("results", "groups", "specexec")
    echo(_as_json({name: results[name] for name in shown if name in results}) if as_json
               else _table(results), nl=as_json)  # fmt: skip
    return 0


def _evaluate(
    manager: Any, found: list[Any], asked: EvalRequest, llm: Engine, cache: str | None, samples: bool
) -> dict[str, Any]:
    from lm_eval import evaluator

    from specexec.evaluation.lm_eval import SpecExecLM

    evaluator.get_git_commit_hash = _commit  # the harness's own lets git complain aloud where no repository is
    results: dict[str, Any] = evaluator.simple_evaluate(
        model=SpecExecLM(llm, asked.seed),
        tasks=found,
        task_manager=manager,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        use_cache=cache,
        apply_chat_template=asked.chat,
        log_samples=samples,
        confirm_run_unsafe_code=asked.allow_code,
    )
    return results


def _commit() -> str | None:
    """Of the repository around the working directory, which the harness notes in its report; None outside of one."""
    try:
        found = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None


def _manager(asked: EvalRequest) -> Any:
    """What the harness knows of tasks. Its own thousands take seconds to list: only where one of them may be meant."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=asked.include, include_defaults=not all(map(_is_file, asked.tasks)))


def _found(manager: Any, asked: EvalRequest) -> list[Any]:
    """Tasks and groups, data included; whatever is wrong with them is said before weights are loaded."""
    if missing := [name for name in asked.tasks if _is_file(name) and not Path(name).is_file()]:
        raise TaskNotFound(f"there is no task file {missing[0]}.")
    names = [one for name in asked.tasks for one in ([name] if _is_file(name) else _matching(manager, name))]
    found = [one for name in names for one in _loaded(manager, name)]
    if not asked.allow_code and (unsafe := [str(one) for one in found if getattr(one, "UNSAFE_CODE", False)]):
        raise click.UsageError(f"{unsafe[0]} runs code that the model writes. Allow that with --allow-code.")
    return found


def _is_file(name: str) -> bool:
    return name.endswith(TASK_FILES)


def _matching(manager: Any, name: str) -> list[str]:
    if matching := sorted(manager.match_tasks([name])):
        return matching
    near = get_close_matches(name, manager.all_tasks, n=3)
    raise TaskNotFound(
        f"lm-evaluation-harness has no task {name!r}.",
        hint=f"{', '.join(near)}." if near else "a .yaml file, or --include with a folder of them.",
    )


def _loaded(manager: Any, name: str) -> list[Any]:
    """The group of that name, or its tasks."""
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, KeyError, TypeError) as problem:  # as many as ways to write a wrong task, or no data
        raise TaskNotFound(
            f"task {name} cannot be loaded: {problem}", hint="its file; data sets come from the Hub and stay here."
        ) from problem
    groups = list(loaded["groups"].values())
    return groups[:1] or list(loaded["tasks"].values())


def _cache_of(path: Path, llm: Engine, options: EngineOptions) -> str:
    """The harness keys answers by question alone, so a file is for one model, its number formats and context only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "" if options.load.head_quant == "none" else f"-{options.load.head_quant}-head"
    compute = "" if options.load.compute == "float" else f"-in-{options.load.compute}"
    kept = f"-kv{options.load.kv_quant}" if options.load.kv_quant else ""
    weights = fingerprint(llm.folders["target"], options.load.lora)
    lossy = "".join(f"-lossy-{one}" for one in llm.lossy)
    return f"{path}-{weights}-{options.load.dtype}{head}{compute}{kept}{lossy}-{llm.context}"


def _table(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    return "\n".join(tables)


def _as_json(results: dict[str, Any]) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False)


def _check_place(output: Path) -> None:
    """Refuse a place where results could not be written when they are there."""
    if output.exists():
        raise OutputFileExists(f"{output} already exists.", hint="another -o.")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "nothing can be written there", str(output))


def _check_extra() -> None:
    if find_spec("lm_eval") is None:
        raise MissingExtra(
            "eval needs lm-evaluation-harness, which is not installed.",
            hint=f"{Path(sys.executable).name} -m pip install 'specexec[eval]'",
        )


@contextmanager
def _progress(verbosity: Verbosity) -> Iterator[None]:
    """The harness and its data sets paint bars on stderr whatever one asks of them; with -q they go nowhere."""
    if not verbosity.quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield
