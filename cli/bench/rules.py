"""Rows of `specexec bench --rules`: the same prompts written with other verification rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cli.bench.rounds import Row, memory_B
from cli.terminal.screen import Screen
from offload.hub.names import called
from specexec.errors import BadText

if TYPE_CHECKING:
    from specexec.engine.engine import Engine
    from specexec.evaluation.rule_runner import Tally
    from specexec.model.tree_lm import TreeLM
    from specexec.text.messages import Prompt


def measure_rules(
    llm: Engine,
    prompts: Sequence[Prompt],
    rules: Sequence[str],
    plain: Row,
    tokens: int,
    screen: Screen,
    lossy: Sequence[str] = (),
) -> list[Row]:
    """A row for each rule, at the temperature of the plain row; texts are measured and discarded.

    Those in `lossy` change the distribution of the text, and their rows say so.
    """
    from specexec.evaluation.rule_runner import RuleRunner

    target, draft = two_models(llm)
    rows = []
    for rule in rules:
        screen.say(f"rule {rule}, T = {plain.temperature:g}")
        runners = [RuleRunner(target, draft, rule, plain.temperature, seed) for seed in range(len(prompts))]
        for runner, prompt in zip(runners, prompts, strict=True):
            runner.write(llm.encode(prompt), tokens)
        rows.append(
            _row(llm, f"{rule} (LOSSY)" if rule in lossy else rule, [runner.tally for runner in runners], plain)
        )
    return rows


def two_models(llm: Engine) -> tuple[TreeLM, TreeLM]:
    """Target and drafter, which the rules use. Raises BadText unless one model drafts, by the target's token ids."""
    from specexec.model.tree_lm import TreeLM

    if (several := len(llm.folders) - 1) > 1:
        raise BadText(
            f"--rules compares rules on one model that drafts, here {several} do.", hint="--drafters with one of them."
        )
    target, draft = llm.models["target"], llm.models.get("drafter")
    if not isinstance(target, TreeLM) or not isinstance(draft, TreeLM):
        raise BadText("--rules compares rules on a model that drafts.", hint="--drafters sibling, or a path.")
    return target, draft


def _row(llm: Engine, rule: str, tallies: list[Tally], plain: Row) -> Row:
    tokens, sweeps = sum(one.tokens for one in tallies), sum(one.sweeps for one in tallies)
    seconds, draft_s = sum(one.seconds for one in tallies), sum(one.draft_s for one in tallies)
    most, deepest = sum(one.most for one in tallies), max(depth for one in tallies for depth in [-1, *one.depths])
    return replace(
        plain,
        drafter=called(llm.folders["drafter"]),  # alone, whatever is joined to it
        planner=f"rule: {rule}",
        budget=f"{sum(one.nodes for one in tallies) / sweeps:.0f}",
        sweeps=sweeps,
        tokens_per_sweep=tokens / sweeps,
        draft_s=draft_s / sweeps,
        stream_s=0.0,
        compute_s=(seconds - draft_s) / sweeps,
        tokens_per_s=tokens / seconds,
        tokens_per_s_sd=0.0,
        vs_plain=tokens / seconds / plain.tokens_per_s,
        same_texts=0,
        texts=0,
        memory_B=memory_B(llm.device),
        accepted_by_depth=tuple(sum(one.depths[d] for one in tallies) / sweeps for d in range(deepest + 1)),
        calibration_error=None,
        hit_rate=None,
        hidden=0.0,
        of_bound=sum(one.taken for one in tallies) / most if most else None,
    )
