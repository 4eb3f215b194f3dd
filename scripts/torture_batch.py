"""Kill batch runs at random moments, tear their files, resume them, and compare with an undisturbed run.

    python scripts/torture_batch.py --kills 1000                   the files, with letters for a model
    python scripts/torture_batch.py --kills 20 --engine demo       the whole program, with the built-in pair

Letters are also killed in a sweep of a random number, so that some kills hit an answer on the slowest machine.
Half of the kills also cut bytes off the end of the results, as a power cut would: without that a kill proves little,
because the system keeps what a dead process has written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import click

import cli.batch.command
import cli.batch.output.partial
from cli.app import main as command_line
from specexec.engine.request_types import Partial, Request
from specexec.stats import Completion, Progress

CUT_MOST = 4000  # bytes: several records


class Letters:
    """An engine whose answers are letters drawn by the item's seed, a few every sweep; has what a batch run needs."""

    def __init__(self, sweep_s: float) -> None:
        self.sweep_s = sweep_s
        self.last_sweep: int | None = None  # the process kills itself then

    @property
    def encoding(self) -> Letters:
        """Its own; it has no chat template by which thoughts could be recognised."""
        return self

    template = None

    def progress(self) -> Progress:
        return Progress(0, 1, 0, 0)

    def stop(self) -> None:
        pass

    def batch(self, requests: Iterable[Request], parallel: int | Literal["auto"]) -> LettersBatch:
        return LettersBatch(iter(requests), 4 if parallel == "auto" else parallel, self.sweep_s, self.last_sweep)


class LettersBatch:
    """A few answers at a time."""

    def __init__(self, requests: Iterator[Request], parallel: int, sweep_s: float, last_sweep: int | None) -> None:
        self.done, self.sweeps = False, 0
        self._requests, self._parallel, self._sweep_s, self._last_sweep = requests, parallel, sweep_s, last_sweep
        self._live: dict[int, tuple[Request, list[int]]] = {}

    @property
    def partial(self) -> list[Partial]:
        return [Partial(index, tuple(tokens)) for index, (_, tokens) in self._live.items()]

    def sweep(self) -> list[Completion]:
        while len(self._live) < self._parallel and (request := next(self._requests, None)):
            self._live[request.index] = (request, list(request.written))
        self.done = not self._live
        time.sleep(self._sweep_s)
        self.sweeps += 1
        if self.sweeps == self._last_sweep:
            os.kill(os.getpid(), signal.SIGKILL)
        return [answer for index in list(self._live) if (answer := self._write(index)) is not None]

    def _write(self, index: int) -> Completion | None:
        request, tokens = self._live[index]
        sampling = request.sampling
        whole = [97 + hash((sampling.seed, at)) % 26 for at in range(sampling.max_tokens)]
        assert whole[: len(tokens)] == tokens, "an answer must go on from its own beginning"
        tokens += whole[len(tokens) : len(tokens) + 7]
        if len(tokens) < len(whole):
            return None
        del self._live[index]
        text = bytes(tokens).decode()
        return Completion(index, text, tuple(tokens), "length", 1, sampling.seed or 0, 1, 0, 0, 0, 0.0)

    def close(self) -> None:
        pass


def run(arguments: list[str], kill_after_s: float | None) -> int | None:
    """One run in a process of its own; its exit code, or None if it was killed."""
    child = os.fork()  # everything is imported already: a start costs milliseconds
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(command_line(arguments))
    began = time.monotonic()
    while kill_after_s is None or time.monotonic() - began < kill_after_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGKILL else code
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def records(path: Path) -> list[tuple[str, list[int], str, str]]:
    """What must not depend on what happened to the run; every line must be whole."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((line["id"], line["token_ids"], line["text"], line["finish_reason"]) for line in lines)


def tear(path: Path, chance: random.Random) -> bool:
    """Cut the end of the results off, with a chance of one half."""
    if not path.exists() or chance.random() < 0.5:
        return False
    size = path.stat().st_size
    os.truncate(path, max(size - chance.randrange(1, CUT_MOST), 0))
    return size > 0


def write_items(path: Path, count: int, longest: int, chance: random.Random) -> None:
    """Questions of different lengths of answer."""
    items = (
        {"id": f"item-{number}", "prompt": f"Question {number}?", "max_tokens": chance.randrange(1, longest)}
        for number in range(count)
    )
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@click.command()
@click.option("--kills", default=1000, show_default=True, help="How many runs to kill.")
@click.option("--items", default=40, show_default=True, help="Prompts of one file.")
@click.option("--longest", default=120, show_default=True, help="Longest answer, in tokens.")
@click.option("--engine", type=click.Choice(["letters", "demo"]), default="letters", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, items: int, longest: int, engine: str, seed: int) -> None:
    """Torture the results of `specexec generate`; the exit code is 1 if anything was lost, doubled or changed."""
    chance = random.Random(seed)
    cli.batch.output.partial.EVERY_S = 0.005
    letters = Letters(0.001)
    if engine == "letters":
        setattr(cli.batch.command, "running_engine", lambda *_: nullcontext(letters))  # noqa: B010 - not its export
    killed = torn = files = partials = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        source, expected, output = (Path(folder) / name for name in ("in.jsonl", "expected.jsonl", "out.jsonl"))
        write_items(source, items, longest, chance)
        common = ["-q", "generate", str(source), "--seed", "5", "-t", "0.8", "--dtype", "f32"]
        command_line([*common, "-o", str(expected)])  # whatever is imported late is imported here, once
        began = time.monotonic()
        common += ["--overwrite"]
        code = run([*common, "-o", str(expected)], None)
        whole_s = time.monotonic() - began
        common.remove("--overwrite")
        assert code == 0, f"the undisturbed run ended with {code}"
        wanted = records(expected)
        while killed < kills:
            for file in Path(folder).glob("*out.jsonl*"):
                file.unlink()
            code = None
            while code is None:
                delay_s = chance.uniform(0, 0.4 * whole_s) if killed < kills else None
                letters.last_sweep = None
                if engine == "letters" and killed < kills and chance.random() < 0.5:
                    delay_s, letters.last_sweep = None, chance.randrange(1, 30)
                code = run([*common, "-o", str(output), "--resume", f"--parallel={chance.choice([1, 3, 8])}"], delay_s)
                killed += code is None
                torn += code is None and tear(output, chance)
                partials += code is None and output.with_name("out.jsonl.partial.json").exists()
            files += 1
            same = code == 0 and records(output) == wanted
            wrong += not same
            if not same:
                click.echo(f"file {files}: exit code {code}, {len(records(output))} of {len(wanted)} records", err=True)
    click.echo(
        f"{killed} kills, {torn} with a torn tail, {partials} in mid-answer · {files} files of {items} items · "
        f"{wrong} not as the undisturbed run"
    )
    sys.exit(1 if wrong or killed < kills else 0)


if __name__ == "__main__":
    main()
