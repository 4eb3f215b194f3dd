"""Which variables of a chat template control thinking: found by rendering a prompt with and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from specexec.text.formats.probe import Probe

Level: TypeAlias = Literal["off", "on", "low", "medium", "high"]
LEVELS: tuple[Level, ...] = ("off", "on", "low", "medium", "high")

# Variables that templates read, and their values by level; the first ones that change the prompt are the switch.
_SWITCHES: tuple[tuple[str, dict[Level, object]], ...] = (
    ("enable_thinking", {"off": False, "on": True}),
    ("thinking", {"off": False, "on": True}),
    ("thinking_mode", {"off": "chat", "on": "thinking"}),
    ("thinking_mode", {"off": "disabled", "on": "enabled"}),
    ("reasoning", {"off": False, "on": True}),
    ("reasoning_effort", {"off": "no_think", "low": "low", "high": "high"}),
    ("reasoning_effort", {"off": "none", "low": "low", "medium": "medium", "high": "high"}),
    ("reasoning_effort", {"low": "low", "medium": "medium", "high": "high"}),
    ("thinking_budget", {"off": 0, "low": 512, "medium": 2048, "high": 8192}),
)
_ANY_TEXT = "Lprobe4"  # no level of any template


@dataclass(frozen=True)
class Thinking:
    """`variables` for the template, and one sentence on what they do to a prompt."""

    variables: Mapping[str, object]
    effect: str


def thinking(probe: Probe, level: Level) -> Thinking:
    """The template variables that make its model think as much as asked, as far as it has any."""
    found = {name: values for name, values in reversed(_SWITCHES) if _changes(probe, name, values)}
    chosen = {name: value for name, values in found.items() if (value := _value(values, level)) is not None}
    if not chosen:
        known = [one for one in LEVELS if any(_value(values, one) is not None for values in found.values())]
        what = f"knows only {', '.join(known)}" if known else "has no variable for how much to think"
        return Thinking({}, f"this model's chat template {what}.")
    shown = ", ".join(f"{name}={value}" for name, value in chosen.items())
    levels = {one: probe.cue(_variables(found, one)) for one in LEVELS}
    alike = [one for one in LEVELS if one != level and levels[one] == levels[level]]
    same = f"; {' and '.join(alike)} would be the same" if alike else ""
    return Thinking(chosen, f"the chat template gets {shown}{same}.")


def _variables(found: Mapping[str, Mapping[Level, object]], level: Level) -> dict[str, object]:
    return {name: value for name, values in found.items() if (value := _value(values, level)) is not None}


def _value(values: Mapping[Level, object], level: Level) -> object | None:
    """The value for a level; `on` is used for low, medium and high where only that is known, and they for it."""
    if level in values or level == "off":
        return values.get(level)
    return values.get("on", values.get("medium", values.get("high")))


def _changes(probe: Probe, name: str, values: Mapping[Level, object]) -> bool:
    """Whether every one of these values is taken, and they differ, that of `off` from all others.

    A template that writes down any text whatever says nothing about which text turns thinking off.
    """
    cues = {level: probe.cue({name: value}) for level, value in values.items()}
    if None in cues.values() or len(set(cues.values())) < 2:
        return False
    others = [cue for level, cue in cues.items() if level != "off"]
    written = isinstance(values.get("off"), str) and _ANY_TEXT in (probe.cue({name: _ANY_TEXT}) or "")
    return cues.get("off") not in others and not written
