"""`specexec distill`: the group of the commands that make a drafter."""

from __future__ import annotations

import click

from cli.distill.head import head
from cli.distill.model import model
from cli.distill.record import record


@click.group(short_help="Make a drafter for a model of your own.")
def distill() -> None:
    """Make a drafter for a model that has none, such as a fine-tune: record what it writes, then train on that.

    \b
      specexec distill record -m ./mine --prompts prompts.txt -o recorded
      specexec distill head recorded -o mine-head
      specexec chat -m ./mine -d ./mine-head

    A drafter never changes a text: a bad one is only slow.
    """


distill.add_command(record)
distill.add_command(head)
distill.add_command(model)
