"""`specexec completion`: the script that lets a shell complete our commands and options."""

from __future__ import annotations

from typing import Literal

import click
from click.shell_completion import get_completion_class

from cli.shared.control_codes import echo
from cli.shared.verbosity import verbosity_options

HOW = {
    "bash": "specexec completion bash > ~/.local/share/bash-completion/completions/specexec",
    "zsh": "specexec completion zsh > ~/.zfunc/_specexec      (a folder in $fpath)",
    "fish": "specexec completion fish > ~/.config/fish/completions/specexec.fish",
}


@click.command(epilog="\b\n" + "\n".join(HOW.values()))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@verbosity_options
def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print the completion script for SHELL."""
    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    echo(kind(root, {}, "specexec", "_SPECEXEC_COMPLETE").source())
