"""`specexec version`: what is installed, read from package metadata so that nothing heavy is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import click

from cli.verbosity import Verbosity, verbosity_options

PARTS = ("torch", "transformers", "safetensors", "accelerate", "bitsandbytes", "numpy")


@click.command()
@verbosity_options
@click.pass_obj
def version(verbosity: Verbosity) -> None:
    """Show the version; with -v also what it runs on."""
    click.echo(f"specexec {installed_version('specexec')}")
    if verbosity.verbose:
        click.echo(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
        for part in PARTS:
            click.echo(f"{part} {_installed(part)}")


def _installed(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "not installed"
