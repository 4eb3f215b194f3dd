"""What knowing its experts is worth to `--budget auto`: tokens per second over one slow link, paired over the prompts.

Four engines over the same pair, each prompt through all of them in turn, so that a slow minute hits all alike:

* **learned**: a sweep's bytes are what the experts visited so far say of so many rows, and likely experts come first;
* **no guesses**: the same, and every expert comes when it was asked for;
* **free choice**: bytes as if rows chose their experts independently;
* **unaware**: every sweep is thought to bring all experts.

Without TARGET and DRAFTER a random mixture of 64 experts, 2 for each row (as sparse as gpt-oss and DeepSeek-V3), and a
copy of it whose weights are off by `--noise` of their size. Texts must be equal. Prints tokens/s, tokens, rows and
bytes of a sweep, and each way against unaware with a 95 % bootstrap interval over prompts.

    python scripts/measure_expert_budget.py
    python scripts/hybrid_pair.py build/hybrid
    python scripts/measure_expert_budget.py build/hybrid/target build/hybrid/drafter
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from bootstrap import rate, ratio
from measure_trees import in_turn, prompts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import offload
import specexec
from cli.shared.quantities import parse_speed_Bps
from offload.checkpoint.routing import Visits
from offload.stream.stream import LayerStream
from specexec import SamplingParams
from specexec.engine.engine import Engine
from specexec.text.messages import Prompt

DEMO = Path(offload.__file__).parent / "demo" / "target"
UNAWARE = "unaware"
WAYS = ("learned", "no guesses", "free choice", UNAWARE)


@dataclass(frozen=True)
class Ran:
    """One answer."""

    tokens: tuple[int, ...]
    sweeps: int
    rows: int
    read_B: int
    wrong_B: int
    seconds: float


def as_told(llm: Engine, way: str) -> Engine:
    """The engine that knows as much of its experts as `way` says."""
    stream = offload.stream_of(llm._model).stream
    assert isinstance(stream, LayerStream)
    if way != "learned":
        setattr(stream, "expect", lambda likely: None)  # noqa: B010 - a stand-in for a method
    if way == "free choice":
        setattr(stream, "_visits", Unmoved(stream.routing))  # noqa: B010
    if way == UNAWARE:
        llm.accounting.cost.share = np.ones_like
    return llm


class Unmoved(Visits):
    """Whatever is visited, rows choose freely."""

    def learn(self, rows: int, visited: int) -> None:
        pass


def answer(llm: Engine, prompt: Prompt, sampling: SamplingParams) -> Ran:
    """One prompt."""
    stream = offload.stream_of(llm._model)
    before, began_s = stream.stats(), time.perf_counter()
    bursts = list(llm.stream(prompt, sampling))
    seconds, after = time.perf_counter() - began_s, stream.stats()
    tokens = tuple(token for burst in bursts for token in burst.tokens)
    read_B, wrong_B = after.bytes_read - before.bytes_read, after.wrong_B - before.wrong_B
    return Ran(tokens, len(bursts), sum(burst.nodes + 1 for burst in bursts), read_B, wrong_B, seconds)


def took(runs: list[Ran]) -> np.ndarray:
    """Tokens and seconds of each answer."""
    return np.array([[len(run.tokens), run.seconds] for run in runs])


def make_pair(folder: Path, noise: float) -> tuple[Path, Path]:
    """A random mixture, and a copy that is a little off, with the demo's tokenizer."""
    numbers = {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_experts": 64, "num_experts_per_tok": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **numbers), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 1.0 if "embed" in name else 0.4 if "lm_head" in name else parameter.shape[-1] ** -0.5
                parameter.normal_(std=scale)
        for name in ("target", "drafter"):
            model.save_pretrained(folder / name)
            AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder / name)
            for parameter in model.parameters():
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0)
    return folder / "target", folder / "drafter"


@click.command()
@click.argument("target", required=False)
@click.argument("drafter", required=False)
@click.option("--link-limit", default="40MB/s", show_default=True)
@click.option("--noise", default=0.1, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--limit", default=12, show_default=True, help="Prompts to use, spread over the list.")
def main(
    target: str | None, drafter: str | None, link_limit: str, noise: float, temperature: float, tokens: int, limit: int
) -> None:
    """Compare what the budget knows of experts."""
    asked = prompts(limit)
    limit_Bps = parse_speed_Bps(link_limit)
    runs: dict[str, list[Ran]] = {way: [] for way in WAYS}
    with ExitStack() as opened:
        if target is None or drafter is None:
            scrap = Path(opened.enter_context(TemporaryDirectory()))
            target, drafter = (str(path) for path in make_pair(scrap, noise))
        engines = {}
        for way in WAYS:
            llm = specexec.load(target, drafter=drafter, offload="disk", link_limit_Bps=limit_Bps, dtype="f32")
            engines[way] = as_told(opened.enter_context(llm), way)
            answer(engines[way], asked[-1], SamplingParams(max_tokens=16))
        for prompt, sampling in in_turn(asked, temperature, tokens):
            for way in WAYS:
                runs[way].append(answer(engines[way], prompt, sampling))
        alike = {way: offload.stream_of(engines[way]._model).stream.routing.alike for way in WAYS}
        whole_B = offload.stream_of(engines[UNAWARE]._model).bytes_per_sweep
    assert all(a.tokens == b.tokens for way in WAYS for a, b in zip(runs[way], runs[UNAWARE], strict=True)), "texts"
    click.echo(f"{len(asked)} prompts, T = {temperature:g}, link {link_limit}, all texts equal\n")
    click.echo(f"| budget | tokens/s | tokens a sweep | rows a sweep | of {whole_B:,} B | guessed in vain | alike |")
    click.echo("|---|---|---|---|---|---|---|")
    for way in WAYS:
        sweeps = sum(run.sweeps for run in runs[way])
        click.echo(
            f"| {way} | {rate(took(runs[way]))[0]:.2f} | {sum(len(run.tokens) for run in runs[way]) / sweeps:.2f} "
            f"| {sum(run.rows for run in runs[way]) / sweeps:.1f} "
            f"| {sum(run.read_B for run in runs[way]) / sweeps / whole_B:.2f} "
            f"| {sum(run.wrong_B for run in runs[way]) / sweeps / whole_B:.3f} | {alike[way]:.2f} |"
        )
    for way in WAYS[:-1]:
        click.echo(f"\n{way} / {UNAWARE}: {ratio(took(runs[way]), took(runs[UNAWARE]))}")


if __name__ == "__main__":
    main()
