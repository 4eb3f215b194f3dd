"""Options of a command's --help in sections: common ones first, then memory, drafting, sampling and output."""

from __future__ import annotations

import click

from specexec.sampling.params import SamplingParams

_MEMORY = ("offload", "ram", "vram", "ctx", "device", "dtype", "head_quant", "compute", "kv_quant", "kv", "link_limit")
_DRAFTING = (
    *("drafter", "drafter_device", "drafter_quant", "drafter_lora", "draft_vocab", "draft_window"),
    *("budget", "exact", "lossy", "planner"),
)
_OUTPUT = (
    *("as_json", "markdown", "plain", "stats", "tree", "hide_thinking", "bell", "notify_command"),
    *("quiet", "verbose", "log_file", "log_json", "color", "colour", "traceback"),
)
_TOOLS = ("mcp", "mcp_allow", "yes", "mcp_timeout")
_SAMPLING = ("schema", *SamplingParams.__dataclass_fields__)


class SectionedCommand(click.Command):
    """A command with more options than a screen has lines."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {
            name: [] for name in ("Options", "Tools", "Memory", "Drafting", "Sampling", "Output")
        }
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if record is not None:
                sections[_section(option.name or "")].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _section(option: str) -> str:
    places = {"Tools": _TOOLS, "Memory": _MEMORY, "Drafting": _DRAFTING, "Output": _OUTPUT, "Sampling": _SAMPLING}
    return next((name for name, options in places.items() if option in options), "Options")
