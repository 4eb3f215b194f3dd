"""Memory of a real answer beside the plan, and inside a limit: a fresh process loads the model, reads and writes.

The peak is that of the process less what interpreter and libraries take, after the built-in model has written a few
tokens. With `--parallel` texts of different lengths are written at once: `allowed` is the plan and half of what it
leaves of `--ram`, or of what is free, `counted` the plan with what these texts and their guesses were admitted for in
place of the one text of full length. Layers stream with `--offload disk` where no `--ram` makes room for them. With
`--limit` all of it, libraries and page cache included, runs in a control group of that size from its first
instruction on; where none can be made, under RLIMIT_DATA.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from cli.engine.imports import lean_imports
from cli.shared.options import BUDGET, COUNT, SIZE, IntOrAuto

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
MiB = 1 << 20


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--drafter", default="none", show_default=True)
@click.option("--offload", default="disk", show_default=True)
@click.option("--ctx", type=COUNT, default=1024, show_default=True, help="Prompt and answer fill it.")
@click.option("--budget", type=BUDGET, default="64", show_default=True)
@click.option("--parallel", type=BUDGET, default="1", show_default=True, help="Texts at once; auto: of 64, what fits.")
@click.option("--ram", type=SIZE, help="What the model and its texts may take.")
@click.option("--tokens", default=8, show_default=True, help="Length of the answer.")
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--limit", type=SIZE, help="Run inside this much memory, such as 1500MB.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--inside", is_flag=True, hidden=True)
def main(
    folder: Path, drafter: str, offload: str, ctx: int, budget: IntOrAuto, parallel: IntOrAuto, ram: int | None,
    tokens: int, temperature: float, limit: int | None, as_json: bool, inside: bool,
) -> None:  # fmt: skip
    """Let the model in FOLDER answer in a fresh process and compare its memory with the plan."""
    if inside:
        click.echo(json.dumps(_answer(folder, drafter, offload, ctx, budget, parallel, ram, tokens, temperature)))
        return
    command = [sys.executable, *sys.argv, "--inside"]
    with _limited(limit) as (enter, group):
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        group_B = None if group is None else int(_peak_file(group).read_text())
    if ran.returncode:
        raise click.ClickException(f"the process ended with {ran.returncode}, its memory was limited to {limit} bytes")
    record = json.loads(ran.stdout.splitlines()[-1])
    record |= {"limit_B": limit, "limited_by": None if limit is None else "cgroup" if group else "RLIMIT_DATA"}
    record |= {"group_peak_B": group_B}
    if as_json:
        click.echo(json.dumps(record))
        return
    click.echo(f"weights    {record['weights_B'] / MiB:9.1f} MiB")
    of_allowed, of_counted = (record["peak_B"] / record[name] for name in ("allowed_B", "counted_B"))
    click.echo(f"plan       {record['plan_B'] / MiB:9.1f} MiB  {record['placement']}")
    click.echo(f"allowed    {record['allowed_B'] / MiB:9.1f} MiB  {record['together']} texts at a time")
    click.echo(f"counted    {record['counted_B'] / MiB:9.1f} MiB  for those texts")
    click.echo(f"peak       {record['peak_B'] / MiB:9.1f} MiB  {of_allowed:.3f} of allowed, {of_counted:.3f} counted")
    click.echo(f"libraries  {record['libraries_B'] / MiB:9.1f} MiB")
    if limit is not None:
        peak = "" if group_B is None else f", which held {group_B / MiB:.1f} MiB at most, page cache included"
        click.echo(f"limit      {limit / MiB:9.1f} MiB  {record['limited_by']}{peak}")
    for name, nbytes in record["parts_B"].items():
        click.echo(f"  {nbytes / MiB:9.1f} MiB  {name}")


def _answer(
    folder: Path,
    drafter: str,
    offload: str,
    ctx: int,
    budget: IntOrAuto,
    parallel: IntOrAuto,
    ram: int | None,
    tokens: int,
    temperature: float,
) -> dict[str, object]:
    with lean_imports():
        import torch

        import offload as weights
        import specexec
        from offload.checkpoint.quantized.quantize import bitsandbytes
        from specexec.compose.load import load
        from specexec.engine.batch import MOST_PARALLEL
        from specexec.engine.decoder import Step

    bitsandbytes()  # libraries like the others, which a model in few bits would import later
    _compile()
    torch.set_num_threads(1)
    sampling = specexec.SamplingParams(max_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)
    with load("demo", ctx=256, budget=16) as warm:
        warm.generate("hello", sampling)
    del warm
    gc.collect()
    libraries_B = _status_B("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with load(str(folder), drafter=drafter, offload=offload, ctx=ctx, budget=budget, ram_B=ram) as llm:
        room, step, texts_B = llm._room, llm._decoder.step, 0

        def watched(kept: Sequence[int] = ()) -> list[Step]:
            nonlocal texts_B
            steps = step(kept)
            live = [one.sequence for one in steps]
            texts_B = max(texts_B, sum(room.need_B(one.longest, one.most_nodes) for one in live))
            return steps

        setattr(llm._decoder, "step", watched)  # noqa: B010
        words = llm.encode("All that has ever been written fits into memory.")
        longest = (words * ctx)[: ctx - tokens - 1]
        texts = MOST_PARALLEL if parallel == "auto" else parallel
        # Together they fill the context, so that all of them can begin in one sweep.
        prompts = [longest[at % 7 :][: len(longest) * (4 - at % 4) // (4 * texts)] for at in range(texts)]
        batch = llm.batch([specexec.Request(at, one, sampling) for at, one in enumerate(prompts)], parallel)
        results, together = list[specexec.Completion | specexec.Failure](), 1
        while not batch.done:
            ended = batch.sweep()
            together = max(together, batch.live + len(ended))
            results += ended
        written = [len(result.tokens) for result in results if isinstance(result, specexec.Completion)]
        placement = weights.stream_of(llm._model).placement
        one_B = room.need_B(llm.context, 0 if drafter == "none" else room.most if budget == "auto" else budget)
        return {
            "placement": placement.summary,
            "weights_B": sum(placement.need.read_B),
            "plan_B": placement.host_B,
            "allowed_B": placement.host_B + (0 if texts == 1 else room.free_B - one_B),
            "counted_B": placement.host_B + max(texts_B - one_B, 0),
            "peak_B": _status_B("VmHWM") - libraries_B,
            "libraries_B": libraries_B,
            "parts_B": placement.host_parts_B,
            "tokens": min(written) if len(written) == texts else 0,
            "together": together,
        }


def _compile() -> None:
    """Let numba, where it is, load what GGUF's blocks and int4 are expanded by."""
    import numpy as np

    from offload.checkpoint.quantized.arithmetic.compiled import compiled, expand_groups, fill_groups

    codes, floats = np.zeros((1, 16), np.uint8), np.zeros((1, 32), np.float32)
    if loop := compiled(expand_groups):
        loop(codes, np.ones((1, 1), np.uint8), np.zeros((1, 1), np.uint8), np.empty((1, 32), np.uint8))
    if loop := compiled(fill_groups):
        one = np.zeros((1, 1), np.float32)
        loop(codes, (0, 4, 16), (0, 0, 16), 0, 0, np.zeros(16, np.float32), one, one, floats)


def _status_B(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


@contextmanager
def _limited(limit_B: int | None) -> Iterator[tuple[Callable[[], object] | None, Path | None]]:
    """What a child does before it becomes the program, and the control group that it enters, if one can be made."""
    if limit_B is None:
        yield None, None
        return
    home, name = (V1, "memory.limit_in_bytes") if V1.is_dir() else (V2, "memory.max")
    group = home / f"specexec-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit_B))
    except OSError:
        if group.is_dir():
            group.rmdir()
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_B, limit_B)), None
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())), group
    finally:
        group.rmdir()


def _peak_file(group: Path) -> Path:
    return next(file for file in (group / "memory.max_usage_in_bytes", group / "memory.peak") if file.exists())


if __name__ == "__main__":
    main()
