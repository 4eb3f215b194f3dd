"""The options every command shares, by the same names everywhere: what to load, and how to choose tokens."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Literal, TypeAlias, TypeVar

import click
from click.core import ParameterSource

from cli.shared.presets import preset_says
from cli.shared.quantities import parse_count, parse_size_B, parse_speed_Bps
from offload.machine.folders import typed_path
from specexec.compose.load_options import ALLOWED, KV_QUANT, LoadOptions
from specexec.drafters.registry import REGISTRY
from specexec.drafters.registry import names as drafter_names
from specexec.errors import BadOption
from specexec.lossy.asked import Lossy
from specexec.sampling.params import SamplingParams
from specexec.sizes import MOST_NODES

Result = TypeVar("Result")
IntOrAuto: TypeAlias = int | Literal["auto"]
Number = TypeVar("Number", int, float)


class Quantity(click.ParamType[Number]):
    """A number written with a unit."""

    def __init__(self, name: str, parse: Callable[[str], Number]) -> None:
        self.name = name
        self._parse: Callable[[str], Number] = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Number:
        try:
            return self._parse(str(value))
        except ValueError as problem:
            self.fail(f"{problem}".removesuffix(".") + ("" if str(problem).endswith("?") else "."), param, ctx)


class WholeNumber(click.IntRange):
    """click's own, whose error message would call it an "integer range"."""

    name = "whole number"


class RealNumber(click.FloatRange):
    """The same for numbers with a fraction."""

    name = "number"


class AutoOr(click.ParamType[IntOrAuto]):
    """`auto` or a whole number."""

    name = "auto|N"

    def __init__(self, minimum: int, most: int | None = None) -> None:
        self._number = WholeNumber(min=minimum, max=most)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> IntOrAuto:
        if value == "auto":
            return "auto"
        try:
            return self._number(value, param, ctx)
        except click.BadParameter as problem:
            self.fail(f"{problem.message.removesuffix('.')}, nor auto.", param, ctx)


class TextOrFile(click.ParamType[str]):
    """Text as typed, or the contents of a file named as @FILE."""

    name = "text|@file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.startswith("@"):
            return text
        try:
            return typed_path(text[1:]).read_text(encoding="utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else "not UTF-8 text"
            self.fail(f"{text[1:]} cannot be read: {reason}.", param, ctx)


class JsonSchema(click.ParamType[dict[str, object]]):
    """A JSON schema as typed, or in a file named as @FILE."""

    name = "json|@file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, object]:
        if isinstance(value, dict):
            return value
        try:
            schema = json.loads(TEXT_OR_FILE.convert(value, param, ctx))
        except (ValueError, RecursionError) as problem:
            self.fail(f"this is not JSON: {problem}.", param, ctx)
        if not isinstance(schema, dict):
            self.fail('a JSON schema is an object, such as {"type": "object"}.', param, ctx)

        from specexec.errors import BadGrammar  # with llguidance, which --help does not wait for
        from specexec.sampling.json_schema import followed

        try:
            return followed(schema)
        except BadGrammar as problem:
            self.fail(problem.what, param, ctx)


class WrittenGrammar(click.ParamType[str]):
    """A grammar as typed, or in a file named as @FILE, as Lark."""

    name = "grammar|@file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from specexec.errors import BadGrammar  # with llguidance, which --help does not wait for
        from specexec.sampling.lark import lark

        try:
            return lark(TEXT_OR_FILE.convert(value, param, ctx))
        except BadGrammar as problem:
            self.fail(problem.what, param, ctx)


class Device(click.ParamType[str]):
    """Where to compute."""

    name = "auto|cpu|cuda[:N]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r} is none of auto, cpu, cuda and cuda:N.", param, ctx)
        return str(value)


class LossyWay(click.ParamType[str]):
    """One way in which texts may become others."""

    name = "steps=n|prompt=x|kv=x"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            (label,) = Lossy.of([str(value)]).labels
        except BadOption as problem:
            self.fail(problem.what, param, ctx)
        return label


NATURAL = WholeNumber(min=0)
SIZE = Quantity("size", parse_size_B)
SPEED = Quantity("speed", parse_speed_Bps)
COUNT = Quantity("n", parse_count)
BUDGET = AutoOr(0, MOST_NODES)
PARALLEL = AutoOr(1)
TEXT_OR_FILE = TextOrFile()
DRAFT_BITS = click.Choice(ALLOWED["drafter_quant"])
DRAFTS_ON = click.Choice(ALLOWED["drafter_device"])


# Fields of LoadOptions that carry their unit, and how they are typed.
TYPED = {"ram_B": "ram", "vram_B": "vram", "link_limit_Bps": "link_limit"}
LOADING = {"prefix_cache", *(TYPED.get(one.name, one.name) for one in fields(LoadOptions))}
"""Names of the parameters that decide how a model is loaded, and what is kept of its texts."""


@dataclass(frozen=True)
class EngineOptions:
    """What the command line says of an engine: which model, how it is loaded, and what its chat template is given."""

    model: str = "demo"
    """A name, a folder or a repository; empty for the first model of a server."""
    load: LoadOptions = field(default_factory=LoadOptions)
    template_vars: tuple[tuple[str, object], ...] = ()
    allow_control_tokens: bool = False
    prefix_cache: bool | None = None
    """Whether keys and values are kept on disk, and what is there is used; None: of conversations that are kept."""

    def but(self, **changed: object) -> EngineOptions:
        """The same with other fields of LoadOptions."""
        return replace(self, load=replace(self.load, **changed))  # type: ignore[arg-type]  # LoadOptions checks them

    @property
    def asked(self) -> dict[str, object]:
        """All of it, by the names that are typed."""
        loaded = {TYPED.get(name, name): value for name, value in asdict(self.load).items()}
        prompts = {"template_vars": self.template_vars, "allow_control_tokens": self.allow_control_tokens}
        return {"model": self.model, **loaded, **prompts, "prefix_cache": self.prefix_cache}


_DEFAULTS = EngineOptions()


def _names(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Short names of models, for the shell's completion."""
    from offload.hub.names import DEMO, aliases

    return [name for name in (DEMO, *aliases()) if name.startswith(begun)]


def _drafters(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Names of drafters, for the shell's completion: the last of those that are joined by +."""
    before, joined, last = begun.rpartition("+")
    found = REGISTRY if joined else drafter_names()
    return [f"{before}{joined}{name}" for name in found if name.startswith(last) and name not in before.split("+")]


DRAFTER_HELP = f"What guesses ahead: {', '.join(drafter_names())} or a model; several joined by +."
_OWN = "the model's own"

prefix_cache_option = click.option(
    "--prefix-cache/--no-prefix-cache", default=None, show_default="of conversations that are kept",
    help="Keep keys and values on disk, and read no beginning of a text twice.",
)  # fmt: skip
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python that the model brings along. It can do all that you can."
)


def _model_option(several: bool) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    more = "; repeatable" if several else ""
    return click.option("-m", "--model", metavar="MODEL", show_default="demo", shell_complete=_names,
                        multiple=several, help=f"A name, a folder, or org/repo{more}.")  # fmt: skip


_ENGINE = (
    click.option("-d", "--drafter", metavar="NAME", default="auto", shell_complete=_drafters, help=DRAFTER_HELP),
    click.option("--drafter-device", type=DRAFTS_ON, default="auto",
                 help="Where drafter models compute: with the model, or on the cpu beside a GPU."),
    click.option("--drafter-quant", type=DRAFT_BITS, default="none",
                 help="Bits of layers that draft: fewer leave more of a GPU to the model."),
    click.option("--lora", multiple=True, metavar="FOLDER[:SCALE]",
                 help="Add a LoRA adapter of peft to the model's weights; may be repeated."),
    click.option("--drafter-lora", multiple=True, metavar="FOLDER[:SCALE]",
                 help="The same for a drafter model's."),
    click.option("--head-quant", type=click.Choice(ALLOWED["head_quant"]), default="none",
                 help="Bits of the model's own head; nf4 is smaller, and another model."),
    click.option("--compute", type=click.Choice(ALLOWED["compute"]), default="float",
                 help="How a pack in int8 or int4 multiplies; int8 is in integers, and another model."),
    click.option("--kv-quant", type=click.Choice(KV_QUANT), show_default="none",
                 help="Bits of the model's keys and values; 8 and 4 take less memory, and are another model."),
    click.option("--kv", type=click.Choice(ALLOWED["kv"]), default="ram",
                 help="Slowest place for keys and values; disk is for texts longer than RAM holds."),
    click.option("--draft-vocab", type=COUNT, show_default="all",
                 help="Frequent tokens a drafter model may name, such as 32k; those of the text always."),
    click.option("--draft-window", type=COUNT, show_default="all",
                 help="Last tokens a drafter sees beside the first few, such as 4k: for long texts."),
    click.option("--offload", type=click.Choice(ALLOWED["offload"]), default="auto",
                 help="Where the weights live between sweeps."),
    click.option("-b", "--budget", type=BUDGET, default="auto",
                 help=f"Guessed tokens checked per sweep, at most {MOST_NODES}; for the demo auto is 32."),
    click.option("--device", type=Device(), metavar=Device.name, default="auto", help="Where the model computes."),
    click.option("--dtype", type=click.Choice(ALLOWED["dtype"]), default="auto",
                 help="Number format of the weights."),
    click.option("--ctx", "--max-model-len", type=COUNT, show_default=_OWN,
                 help="Context length in tokens, such as 8k."),
    click.option("--ram", type=SIZE, help="Never take more RAM than this, such as 24GiB."),
    click.option("--vram", type=SIZE, help="Never take more GPU memory than this, such as 10GiB."),
    click.option("--link-limit", type=SPEED, help="Slow the weight stream down, such as 4MB/s."),
    click.option("--lossy", type=LossyWay(), multiple=True,
                 help="Let the text be another: keep steps of the drafter that score N (0 to 9), read a share X of a "
                 "long prompt, or keep a share X of its keys and values. Typed each time."),
    click.option("--exact", is_flag=True, help="Decide near-ties by the text alone, at the price of a sweep each."),
    click.option("--offline", is_flag=True, help="Use only what is already on this machine."),
    click.option("--verify", is_flag=True, help="Compare weights with their hashes before loading."),
    trust_option,
)  # fmt: skip

# The types are used twice: here, and by /set inside a session.
SAMPLING_TYPES: dict[str, click.ParamType[int] | click.ParamType[float]] = {
    "max_tokens": WholeNumber(min=1),
    "temperature": RealNumber(min=0),
    "top_p": RealNumber(min=0, max=1, min_open=True),
    "top_k": WholeNumber(min=0),
    "min_p": RealNumber(min=0, max=1),
    "repetition_penalty": RealNumber(min=0, min_open=True),
    "presence_penalty": RealNumber(min=-2, max=2),
    "frequency_penalty": RealNumber(min=-2, max=2),
    "seed": WholeNumber(min=0),
}


def _sampling(
    name: str, says: str, short: str | None = None, unset: str | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    names = [f"--{name.replace('_', '-')}", *([short] if short else [])]
    default = getattr(SamplingParams(), name)
    kind = SAMPLING_TYPES[name]
    metavar = "N" if isinstance(kind, click.IntRange) else "X"
    return click.option(*names, type=kind, metavar=metavar, default=default, show_default=unset or True, help=says)


_SAMPLING = (
    _sampling("max_tokens", "Longest answer, in tokens.", "-n"),
    _sampling("temperature", "0 takes the likeliest token.", "-t", unset=_OWN),
    _sampling("top_p", "Keep the likeliest tokens that sum to this.", unset=_OWN),
    _sampling("top_k", "Keep this many of the likeliest tokens; 0 keeps all.", unset=_OWN),
    _sampling("min_p", "Drop tokens below this share of the likeliest.", unset=_OWN),
    _sampling("repetition_penalty", "Above 1 discourages tokens already in the text.", unset=_OWN),
    _sampling("presence_penalty", "Above 0 discourages tokens already written."),
    _sampling("frequency_penalty", "The same, growing with every use."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."),
    _sampling("seed", "Same seed, same text.", unset="a fresh one, printed"),
    click.option("--ignore-eos", is_flag=True, help="Write on past the model's own end."),
)


def engine_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add what decides about loading; the command receives one `engine_options: EngineOptions`."""

    return _decorate(_collected(command), (_model_option(several=False), *_ENGINE))


def refuse_lossy(options: EngineOptions, why: str) -> None:
    """Raises UsageError where texts may be others than the model's own."""
    if options.load.lossy:
        raise click.UsageError(f"--lossy {options.load.lossy[0]} cannot be here: {why}.")


def _collected(command: Callable[..., Result]) -> Callable[..., Result]:
    """The command with one `engine_options` in place of what decides about loading."""

    @functools.wraps(command)
    def collected(**arguments: object) -> Result:
        load = {one.name: arguments.pop(TYPED.get(one.name, one.name), one.default) for one in fields(LoadOptions)}
        rest = {one.name: arguments.pop(one.name, one.default) for one in fields(EngineOptions)[2:]}
        model = _one_model(arguments.pop("model", None), arguments.pop("positional_model", None))
        chosen = EngineOptions(model, LoadOptions(**load), **rest)  # type: ignore[arg-type]  # click has checked them
        return command(engine_options=chosen, **arguments)

    return collected


def several_engine_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """The same for a command that holds several models; it receives `engine_options: tuple[EngineOptions, ...]`."""

    @functools.wraps(command)
    def collected(**arguments: object) -> Result:
        given = [arguments.pop(name, ()) for name in ("positional_model", "model")]
        if given[0] and not _on_this_line("model"):
            del given[1]
        names = dict.fromkeys(name for some in given if isinstance(some, tuple) for name in some)

        def with_each(engine_options: EngineOptions, **rest: object) -> Result:
            each = tuple(replace(engine_options, model=name) for name in names)
            return command(engine_options=each or (engine_options,), **rest)

        return _collected(with_each)(**arguments)

    return _decorate(collected, (_model_option(several=True), *_ENGINE))


def all_choices(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add what decides about loading and how tokens are chosen; the command receives each by its name."""
    return _decorate(command, (_model_option(several=False), *_ENGINE, *_SAMPLING))


def sampling_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add how tokens are chosen; the command receives one `sampling: SamplingParams`."""

    @functools.wraps(command)
    def collected(**arguments: object) -> Result:
        typed = {field.name for field in fields(SamplingParams)} - {"grammar"}  # that one is read by an engine
        options = [name for name in arguments if name in typed]
        chosen = {name: arguments.pop(name) for name in options}
        chosen["stop"] = chosen["stop"] or None  # the model may have its own
        return command(sampling=SamplingParams(**chosen), **arguments)  # type: ignore[arg-type]  # click has checked them

    return _decorate(collected, _SAMPLING)


def models_argument(command: Callable[..., Result]) -> Callable[..., Result]:
    """The same for a command that holds several models."""
    return click.argument("positional_model", metavar="[MODEL]...", nargs=-1)(command)


def model_argument(command: Callable[..., Result]) -> Callable[..., Result]:
    """`specexec chat llama-70b` says the same as `specexec chat -m llama-70b`."""
    return click.argument("positional_model", metavar="[MODEL]", required=False)(command)


def _on_this_line(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


def was_chosen(name: str) -> bool:
    """Whether a parameter was given for this run: on the command line, in the environment or by a preset."""
    typed = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return click.get_current_context().get_parameter_source(name) in typed or preset_says(name)


def model_was_named() -> bool:
    """Whether this command line says which model; a conversation and a server have their own otherwise."""
    return was_chosen("model") or was_chosen("positional_model")


def _one_model(option: object, argument: object) -> str:
    if option and argument and option != argument and _on_this_line("model"):
        raise click.UsageError(f"Two models were named: {argument!r} and {option!r}.")
    connected = click.get_current_context().params.get("connect") is not None
    return str(argument or option or ("" if connected else _DEFAULTS.model))


def _decorate(
    command: Callable[..., Result], options: tuple[Callable[[Callable[..., Result]], Callable[..., Result]], ...]
) -> Callable[..., Result]:
    for option in reversed(options):
        command = option(command)
    return command
