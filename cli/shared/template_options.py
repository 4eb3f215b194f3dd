"""Variables for a chat template, and what happens to control tokens that are spelled out in a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import click

from specexec.text.template_options import RESERVED

if TYPE_CHECKING:
    from specexec.text.tokenizer import Encoding

Result = TypeVar("Result")
Variable: TypeAlias = tuple[str, object]


class TemplateVariable(click.ParamType[Variable]):
    """A name and its value: JSON where it is, such as true or 3, else text."""

    name = "name=value"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Variable:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is not NAME=VALUE, such as enable_thinking=false.", param, ctx)
        if name in RESERVED:
            self.fail(f"{name} is not for the template: it decides what the template is given.", param, ctx)
        try:
            return name, json.loads(text)
        except ValueError:
            return name, text


control_option = click.option(
    "--allow-control-tokens", is_flag=True,
    help="Read control tokens that a prompt spells, such as <|im_end|>, as tokens.",
)  # fmt: skip
variable_option = click.option(
    "--template-var", "template_vars", type=TemplateVariable(), multiple=True, metavar="NAME=VALUE",
    help="Set a variable of the chat template; may be repeated.",
)  # fmt: skip


def template_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add both; `engine_options` collects them."""
    return variable_option(control_option(command))


def set_template(encoding: Encoding, variables: tuple[Variable, ...], allow_control_tokens: bool) -> None:
    """What every prompt of this run is read with."""
    encoding.variables.update(variables)
    encoding.control_tokens = allow_control_tokens
