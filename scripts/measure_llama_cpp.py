"""Sweeps and texts of a resident model beside llama.cpp with the same weights, in every number format of both.

    npm install --prefix build/node --ignore-scripts node-llama-cpp@3.22.1
    python scripts/measure_llama_cpp.py sweeps build/1b --node build/node
    python scripts/measure_llama_cpp.py texts build/1b --node build/node --drafter offload/demo/drafter
    python scripts/measure_llama_cpp.py table build/llama_cpp.jsonl

Without a folder: SmolLM2-135M-Instruct. Runs of all ways take turns, so that whatever else the machine does slows all
alike; the table has medians, and medians of the ratios within each turn. Every run is a line of --state as soon as it
has ended, and is not repeated: a run that was stopped goes on where it was. What has no line is "not run" in the table.
A sweep is a chain of rows below no text and the logits of its last; a text is greedy, prompt included. On a machine
with other work `--clock cpu --threads 1` counts the processor time of our process and of llama.cpp's, in place of time
that passes.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import click
import real_material
import torch
from gguf_twin import FORMS, write_twin
from tqdm import tqdm

import offload
import specexec
from offload.checkpoint.headers import open_folder
from offload.packs.pack import pack, plan
from specexec import SamplingParams
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.text.messages import Prompt

HERE = Path(__file__).parent
# Ours: the pack, how it computes, and in which dtype.
OURS: dict[str, tuple[str | None, Literal["float", "int8"], torch.dtype]] = {
    "float32": (None, "float", torch.float32),
    "bf16": (None, "float", torch.bfloat16),
    "int8": ("int8", "int8", torch.bfloat16),
    "int4": ("int4", "int8", torch.bfloat16),
    "nf4": ("nf4", "float", torch.bfloat16),
}
PLAIN, LOOKUP = "plain", "look-up"
Clock = Literal["wall", "cpu"]
# Which of ours answers which of theirs: the bits of a weight are the same or fewer.
RIVALS = {"bf16": "F16", "int8": "Q8_0", "int4": "Q4_0", "nf4": "Q4_0"}
ENGINE = """
import readline from "node:readline";
import {getLlama, DraftSequenceTokenPredictor, InputLookupTokenPredictor} from "node-llama-cpp";
const [file, threads, contextSize, guesses] = process.argv.slice(2);
const llama = await getLlama({gpu: false, logLevel: "error", build: "never", maxThreads: Number(threads)});
const open = async (path) => {
    const model = await llama.loadModel({modelPath: path});
    return model.createContext({contextSize: Number(contextSize), batchSize: 512, threads: Number(threads)});
};
const context = await open(file);
let tokenPredictor;
if (guesses === "look-up") tokenPredictor = new InputLookupTokenPredictor();
else if (guesses !== "plain") tokenPredictor = new DraftSequenceTokenPredictor((await open(guesses)).getSequence());
const sequence = context.getSequence(tokenPredictor ? {tokenPredictor} : {});
console.log("ready");
for await (const line of readline.createInterface({input: process.stdin})) {
    const {tokens, count} = JSON.parse(line);
    await sequence.clearHistory();
    const written = [];
    const began = performance.now();
    for await (const token of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        written.push(token);
        if (written.length === count || token === context.model.tokens.eos) break;
    }
    console.log(JSON.stringify({seconds: (performance.now() - began) / 1000, written}));
}
process.exit(0);
"""


def processor_s(pid: int) -> float:
    """Processor seconds that the living threads of a process have had."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def now_s(clock: Clock) -> float:
    """Seconds that have passed, or that this process has computed."""
    return time.perf_counter() if clock == "wall" else time.process_time()


class LlamaCpp:
    """llama.cpp in a process of its own; it answers one run after the other."""

    def __init__(self, node: Path, file: Path, threads: int, guesses: str = PLAIN, context: int = 1024) -> None:
        script = node / "measure_llama_cpp.mjs"
        script.write_text(ENGINE)
        command = ["node", str(script), str(file), str(threads), str(context), guesses]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._said("ready")

    def run(self, clock: Clock, tokens: list[int], count: int) -> tuple[list[int], float]:
        """The tokens that follow these, as many or up to the end, and the seconds from the question to the last."""
        assert self._process.stdin is not None
        began_s = processor_s(self._process.pid)
        self._process.stdin.write(json.dumps({"tokens": tokens, "count": count}) + "\n")
        answer = json.loads(self._said("{"))
        taken_s = processor_s(self._process.pid) - began_s
        return answer["written"], answer["seconds"] if clock == "wall" else taken_s

    def _said(self, begins: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(begins):
                return line
        raise click.ClickException(f"node ended with {self._process.wait()}; what it said is above.")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


class Runs:
    """The runs there are, as lines of one file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **key: object) -> bool:
        """Whether there is a run with these values."""
        return any(all(line.get(name) == value for name, value in key.items()) for line in self.lines)

    def add(self, **line: object) -> None:
        """Write one more."""
        self.lines.append(line)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as out:
            out.write(json.dumps(line) + "\n")


@click.group()
def main() -> None:
    """Measure beside llama.cpp."""


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """What both kinds of runs are told."""
    path = click.Path(path_type=Path)
    for option in (
        click.argument("folder", type=path, required=False),
        click.option("--node", type=path, required=True, help="Where npm has installed node-llama-cpp."),
        click.option("--ways", default=",".join((*OURS, *FORMS)), show_default=True),
        click.option("--threads", default=2, show_default=True),
        click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True),
        click.option("--work", type=path, default=Path("build/llama_cpp"), show_default=True),
        click.option("--state", type=path, default=Path("build/llama_cpp.jsonl"), show_default=True),
    ):
        command = option(command)
    return command


@main.command()
@shared
@click.option("--rows", default="1,16,64,256", show_default=True)
@click.option("--turns", default=9, show_default=True)
def sweeps(
    folder: Path | None,
    node: Path,
    ways: str,
    threads: int,
    clock: Clock,
    work: Path,
    state: Path,
    rows: str,
    turns: int,
) -> None:
    """Seconds of a sweep over so many rows."""
    folder = folder or real_material.model()
    torch.set_num_threads(threads)
    runs, counts = Runs(state), [int(count) for count in rows.split(",")]
    with ExitStack() as open_ones:
        sweeping: dict[str, Callable[[int], float]] = {}
        for way in _named(ways):
            if way in OURS:
                sweeping[way] = partial(_swept, clock, _target(folder, way, work))
            else:
                rival = LlamaCpp(node, _twin(folder, way, work), threads)
                open_ones.callback(rival.close)
                sweeping[way] = partial(_swept_there, clock, rival)
        for count in counts:
            for way in sweeping:  # to warm up
                sweeping[way](count)
        for turn, count, way in tqdm([(t, c, w) for t in range(turns) for c in counts for w in sweeping]):
            key = {"model": folder.name, "threads": threads, "clock": clock, "rows": count, "way": way, "turn": turn}
            if not runs.has(**key):
                runs.add(**key, seconds=sweeping[way](count))


@main.command()
@shared
@click.option("--drafter", type=click.Path(path_type=Path), help="A smaller model of the family, for both.")
@click.option("-n", "--tokens", default=64, show_default=True)
@click.option("--every", default=1, show_default=True, help="Every so many prompts of prompts.jsonl.")
def texts(
    folder: Path | None, node: Path, ways: str, threads: int, clock: Clock, work: Path, state: Path,
    drafter: Path | None, tokens: int, every: int,
) -> None:  # fmt: skip
    """Tokens per second end to end: plain, with guesses from a smaller model, with look-ups."""
    folder = folder or real_material.model()
    torch.set_num_threads(threads)
    runs = Runs(state)
    asked = [json.loads(line) for line in (HERE / "prompts.jsonl").read_text().splitlines()][::every]
    with ExitStack() as open_ones:
        writing: dict[str, Callable[[list[int], int], tuple[list[int], float]]] = {}
        encode: Callable[[Prompt], list[int]] | None = None
        for way in _named(ways):
            guessing = [PLAIN, LOOKUP, *([str(drafter)] if drafter else [])]
            for guesses in guessing:
                name = f"{way}, {'draft' if guesses not in (PLAIN, LOOKUP) else guesses}"
                if way in OURS:
                    llm = open_ones.enter_context(_engine(folder, way, work, guesses))
                    encode, writing[name] = llm.encode, partial(_written, clock, llm)
                else:
                    twin = _twin(drafter, way, work) if drafter and guesses == str(drafter) else None
                    rival = LlamaCpp(node, _twin(folder, way, work), threads, str(twin or guesses))
                    open_ones.callback(rival.close)
                    writing[name] = partial(rival.run, clock)
        if encode is None:
            raise click.ClickException("one of --ways has to be ours: it makes the tokens of the prompts.")
        for number, one in enumerate(tqdm(asked)):
            prompt = [{"role": "user", "content": one["prompt"]}] if one.get("chat") else one["prompt"]
            for name, write in writing.items():
                key = {"model": folder.name, "threads": threads, "clock": clock, "way": name}
                key |= {"prompt": number * every, "asked": tokens}
                if not runs.has(**key):
                    written, seconds = write(encode(prompt), tokens)
                    runs.add(**key, tokens=len(written), written=written, seconds=seconds)


@main.command()
@click.argument("state", type=click.Path(exists=True, path_type=Path))
def table(state: Path) -> None:
    """The runs of a file as tables."""
    lines = Runs(state).lines

    def kind(line: dict[str, Any]) -> tuple[str, int, str]:
        return line["model"], line["threads"], line["clock"]

    for model, threads, clock in sorted({kind(line) for line in lines}):
        own = [line for line in lines if kind(line) == (model, threads, clock)]
        for text in (*_sweep_table(own), *_text_table(own)):
            click.echo(text.replace("{model}", f"{model}, {threads} threads, {clock} time"))


def _sweep_table(lines: list[dict[str, Any]]) -> Iterator[str]:
    lines = [line for line in lines if "rows" in line]
    counts = sorted({line["rows"] for line in lines})
    if not counts:
        return
    found = {(line["way"], line["rows"], line["turn"]): line["seconds"] for line in lines}
    turns = sorted({line["turn"] for line in lines})

    def cell(values: list[float], shown: str) -> str:
        return shown.format(median(values)) if values else "not run"

    def seconds(way: str, count: int) -> list[float]:
        return [found[way, count, turn] for turn in turns if (way, count, turn) in found]

    yield f"\n{{model}}: ms a sweep, {len(turns)} turns\n"
    yield "| rows | " + " | ".join(map(str, counts)) + " |\n|---|" + "--:|" * len(counts)
    for way in (*OURS, *FORMS):
        yield f"| {way} | " + " | ".join(cell([1e3 * one for one in seconds(way, c)], "{:.1f}") for c in counts) + " |"
    for way, rival in RIVALS.items():
        both = [
            [
                found[way, count, turn] / found[rival, count, turn]
                for turn in turns
                if (way, count, turn) in found and (rival, count, turn) in found
            ]
            for count in counts
        ]
        yield f"| {way} / {rival} | " + " | ".join(cell(one, "{:.2f}") for one in both) + " |"


def _text_table(lines: list[dict[str, Any]]) -> Iterator[str]:
    lines = [line for line in lines if "prompt" in line]
    ways = list(dict.fromkeys(line["way"] for line in lines))
    if not ways:
        return
    prompts = set.intersection(*({line["prompt"] for line in lines if line["way"] == way} for way in ways))
    yield f"\n{{model}}: tokens/s end to end, {len(prompts)} prompts that all have answered\n"
    yield "| way | tokens/s |\n|---|--:|"
    for way in ways:
        own = [line for line in lines if line["way"] == way and line["prompt"] in prompts]
        tokens, seconds = (sum(line[name] for line in own) for name in ("tokens", "seconds"))
        yield f"| {way} | {f'{tokens / seconds:.2f}' if seconds else 'not run'} |"


def _named(ways: str) -> list[str]:
    names = ways.split(",")
    if unknown := [name for name in names if name not in OURS and name not in FORMS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join((*OURS, *FORMS))}", param_hint="--ways")
    return names


def _packed(folder: Path, way: str, work: Path) -> Path:
    """The folder itself, or the pack of it, made once."""
    quant = OURS[way][0]
    if quant is None:
        return folder
    out = work / f"{folder.name}-{quant}"
    if not out.exists():
        click.echo(f"packing {out}", err=True)
        work.mkdir(parents=True, exist_ok=True)
        pack(plan(open_folder(folder), quant), out)  # type: ignore[arg-type]  # three of the four there are
    return out


def _twin(folder: Path, form: str, work: Path) -> Path:
    """The GGUF file with the same weights, made once."""
    out = work / f"{folder.name}-{form}.gguf"
    if not out.exists():
        click.echo(f"writing {out}", err=True)
        work.mkdir(parents=True, exist_ok=True)
        write_twin(folder, form, out)
    return out


def _target(folder: Path, way: str, work: Path) -> TreeLM:
    _, compute, dtype = OURS[way]
    model = offload.load(_packed(folder, way, work), "none", dtype=dtype, ctx=512, compute=compute)
    return TreeLM(model, tiled=compute == "float")


def _swept(clock: Clock, lm: TreeLM, rows: int) -> float:
    began_s = now_s(clock)
    cache = KVCache()
    (hidden,) = lm.forward([Rows(cache, [token % lm.vocabulary for token in range(rows)], range(-1, rows - 1))])
    lm.head(hidden[-1:])
    return now_s(clock) - began_s


def _swept_there(clock: Clock, rival: LlamaCpp, rows: int) -> float:
    return rival.run(clock, [*range(rows)], 1)[1]


def _engine(folder: Path, way: str, work: Path, guesses: str) -> specexec.Engine:
    _, compute, dtype = OURS[way]
    return specexec.load(
        str(_packed(folder, way, work)),
        drafter={PLAIN: "none", LOOKUP: "ngram"}.get(guesses, guesses),
        offload="none",
        dtype="f32" if dtype == torch.float32 else "bf16",
        compute=compute,
        ctx=1024,
    )


def _written(clock: Clock, llm: specexec.Engine, prompt: list[int], count: int) -> tuple[list[int], float]:
    if llm.memory is not None:
        llm.memory.forget_past()  # not what other prompts brought
    began_s = now_s(clock)
    answer = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=count))
    return list(answer.tokens), now_s(clock) - began_s


if __name__ == "__main__":
    main()
