"""What the server has done since it started, as Prometheus reads it. Written by the engine's thread alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

_PREFIX = "specexec_"


@dataclass
class Totals:
    """Counters; names are those of the exposition, without prefix."""

    requests_total: int = 0
    requests_rejected_total: int = 0
    requests_cancelled_total: int = 0
    requests_failed_total: int = 0
    prompt_tokens_total: int = 0
    prompt_tokens_reused_total: int = 0
    generated_tokens_total: int = 0
    drafted_tokens_total: int = 0
    accepted_tokens_total: int = 0
    sweeps_total: int = 0
    sweep_seconds_total: float = 0.0
    draft_seconds_total: float = 0.0
    read_bytes_total: int = 0


def together(totals: Iterable[Totals]) -> Totals:
    """The sums over all models."""
    each = list(totals)
    return Totals(**{one.name: sum(getattr(other, one.name) for other in each) for one in fields(Totals)})


_SAYS = {
    "requests_total": "Texts asked for; each choice of a request counts.",
    "requests_rejected_total": "Texts refused because the queue was full.",
    "requests_cancelled_total": "Texts whose client left before the end.",
    "requests_failed_total": "Texts that ended in an error of ours.",
    "prompt_tokens_total": "Prompt tokens of all texts that began.",
    "prompt_tokens_reused_total": "Prompt tokens that needed no computing: an earlier text had them.",
    "generated_tokens_total": "Tokens written.",
    "drafted_tokens_total": "Guesses that the target checked.",
    "accepted_tokens_total": "Guesses that became text.",
    "sweeps_total": "Passes over the weights.",
    "sweep_seconds_total": "Time spent in passes over the weights.",
    "draft_seconds_total": "Time spent guessing before a pass.",
    "read_bytes_total": "Bytes of weights moved.",
    "requests_running": "Texts that share the running sweep.",
    "requests_waiting": "Texts in the queue.",
    "ready": "1 once the first model is loaded.",
    "drafters_failed": "Drafters that failed: texts take more sweeps. The model's card says why.",
}


def exposition(totals: Totals, running: int, waiting: int, *, ready: bool, failed: int) -> str:
    """Prometheus text, format 0.0.4; `failed` drafters."""
    gauges = {
        "requests_running": running,
        "requests_waiting": waiting,
        "ready": int(ready),
        "drafters_failed": failed,
    }
    lines = []
    for name, value in [*((field.name, getattr(totals, field.name)) for field in fields(totals)), *gauges.items()]:
        kind = "gauge" if name in gauges else "counter"
        lines += [
            f"# HELP {_PREFIX}{name} {_SAYS[name]}",
            f"# TYPE {_PREFIX}{name} {kind}",
            f"{_PREFIX}{name} {value}",
        ]
    return "\n".join(lines) + "\n"
