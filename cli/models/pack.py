"""`specexec pack`: lay a model out for streaming, quantised if asked. The originals are only read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.engine.imports import lean_imports
from cli.shared.control_codes import echo
from cli.shared.errors import INTERRUPTED
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import trust_option
from cli.shared.quantities import format_bytes
from cli.shared.verbosity import Verbosity, json_option, start_logging, verbosity_options
from cli.terminal.screen import Screen, watched
from offload.checkpoint.contents import MANIFEST
from offload.checkpoint.documents import check_documents
from offload.placement.quantized_sizes import FORMATS

if TYPE_CHECKING:
    from offload.checkpoint.quantized.quantize import Quant
    from offload.placement.quantized_sizes import FourBits


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option("--quant", type=click.Choice(FORMATS), default="nf4", help="Bits of the layers' weights.")
@click.option("--head-quant", type=click.Choice(["none", "nf4"]), default="none", help="Bits of the head in the pack.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The folder to write.")
@click.option("--device", metavar="cpu|cuda[:N]", default="cpu", help="Where nf4 is computed.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@trust_option
@click.option("--dry-run", is_flag=True, help="Say what would be written, and where; write nothing.")
@json_option()
@verbosity_options
@click.pass_obj
def pack(
    verbosity: Verbosity,
    model: str,
    quant: Quant,
    head_quant: FourBits,
    out: Path,
    device: str,
    offline: bool,
    trust_remote_code: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Write MODEL (a name or a folder) as one aligned file per layer, which streams at the speed of the disk.

    \b
      specexec pack llama-8b --quant nf4 --out packs/llama-8b
      specexec chat -m packs/llama-8b --offload disk

    The same command again continues where it was stopped. Originals are kept.
    """
    screen = Screen(quiet=verbosity.quiet)
    start_logging(verbosity)
    with screen.status(lambda: f"reading {model}…"):
        from cli.models.gate import check_name
        from offload.checkpoint.headers import open_folder
        from offload.hub.names import resolve

        with lean_imports():
            from offload.packs import pack as packs  # torch and transformers: seconds that --help need not pay
        check_name(model, offline=offline, trust_remote_code=trust_remote_code)
        folder = open_folder(resolve(model, offline=offline, code=trust_remote_code).target)
        check_documents(folder.path)
        wanted = packs.plan(folder, quant, trust_remote_code, head_quant)
    layers = f"{len(wanted.shards) - 1} layers"
    facts = {
        "model": str(folder.path), "out": str(out), "quant": quant, "head_quant": head_quant, "device": device,
        "offline": offline,
        "trust_remote_code": trust_remote_code, "dry_run": dry_run, "layers": len(wanted.shards) - 1,
        "read_B": wanted.read_B, "size_B": wanted.size_B, "loads_in_transformers": wanted.loadable,
    }  # fmt: skip
    if dry_run and as_json:
        echo(json.dumps(facts, ensure_ascii=False))
        return 0
    if dry_run:
        echo(f"would write {layers}, {format_bytes(wanted.size_B)}, to {out}", folded=True)
        return 0
    from tqdm import tqdm

    began_s = time.perf_counter()
    hidden = True if verbosity.quiet else None  # None: shown on a terminal only
    try:
        with tqdm(total=wanted.read_B, unit="B", unit_scale=True, desc="pack", disable=hidden, leave=False) as bar:
            packs.pack(wanted, out, device, watched(bar, screen))
    except KeyboardInterrupt:
        screen.tell(f"stopped; the same command continues where it was. {out} is no model yet.")
        return INTERRUPTED
    spent_s = time.perf_counter() - began_s
    if as_json:
        echo(json.dumps(facts | {"seconds": round(spent_s, 3)}, ensure_ascii=False))
    screen.say(f"wrote {layers}, {format_bytes(wanted.size_B)}, in {spent_s:.0f} s; sha256 in {out / MANIFEST}")
    screen.say(f"originals are kept. Try: specexec chat -m {out}")
    return 0
