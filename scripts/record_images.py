"""Record what transformers' image processors make of the pictures in the tests with torchvision: tests/recorded/images.

    pip install torchvision
    python scripts/record_images.py

Some families have no image processor but torchvision's. Tests of them read these files where there is no torchvision.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import transformers
from PIL import Image

from specexec.text.image_processor import needs_torchvision
from tests.pictured import KNOWN, PICTURES, config_of, picture
from tests.recorded_images import record


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Record the families NAMES, or all that need torchvision."""
    pictures = [Image.open(io.BytesIO(picture(seed))) for seed in PICTURES]
    for name in names or filter(needs_torchvision, KNOWN):
        family = KNOWN[name]
        processor = getattr(transformers, family.prepares)(**family.prepared(config_of(name)))
        click.echo(record(name, processor, pictures))


if __name__ == "__main__":
    main()
