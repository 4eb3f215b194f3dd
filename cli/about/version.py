"""`specexec version`: what is installed, read from package metadata so that nothing heavy is imported."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import click

from cli.shared.control_codes import echo
from cli.shared.verbosity import Verbosity, json_option, verbosity_options

PARTS = ("torch", "transformers", "safetensors", "accelerate", "bitsandbytes", "numpy")


@click.command()
@json_option()
@verbosity_options
@click.pass_obj
def version(verbosity: Verbosity, as_json: bool) -> None:
    """Show the version; with -v also what it runs on."""
    versions = {"specexec": installed_version("specexec")}
    if verbosity.verbose or as_json:
        versions |= {"Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
        versions |= {part: _installed(part) for part in PARTS}
    if as_json:
        echo(json.dumps(versions))
    else:
        echo("\n".join(f"{part} {which}" for part, which in versions.items()))


def _installed(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "not installed"
