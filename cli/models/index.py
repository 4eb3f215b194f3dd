"""`specexec index`: texts that answers are likely to quote, for the ngram drafter to guess from."""

from __future__ import annotations

from pathlib import Path

import click

from cli.engine.imports import lean_imports
from cli.shared.control_codes import echo
from cli.shared.options import EngineOptions, trust_option
from cli.shared.quantities import format_bytes, format_count
from cli.shared.verbosity import Verbosity, start_logging, verbosity_options
from specexec.errors import BadText

MOST_B = 16_000_000  # some 4 million tokens: 80 MB beside the model, and 3 GB while one such file is read and sorted


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-m", "--model", metavar="MODEL", default=EngineOptions().model, help="Whose tokenizer reads them.")
@click.option("--forget", is_flag=True, help="Delete the index and all earlier texts instead.")
@click.option("--offline", is_flag=True, help="Use only what is already on this machine.")
@trust_option
@verbosity_options
@click.pass_context
def index(
    ctx: click.Context, files: tuple[Path, ...], model: str, forget: bool, offline: bool, trust_remote_code: bool
) -> None:
    """Read text FILES that answers may quote; --drafter ngram and sibling+ngram then guess from them.

    At most 16 MB of text. Replaces the index that was there. Models with the same tokenizer share it. The text of no
    answer changes.
    """
    if not files and not forget:
        raise click.UsageError("Nothing to index: name some text files, or --forget.")
    if (size := sum(file.stat().st_size for file in files)) > MOST_B:
        raise BadText(
            f"{len(files)} files hold {format_bytes(size)} of text; an index takes {format_bytes(MOST_B)} at most.",
            why="it lies in memory beside the model.",
            hint="only the files that answers are likely to quote.",
        )
    start_logging(ctx.ensure_object(Verbosity))
    from cli.engine.ngram_store import corpus_path, save
    from cli.engine.ngram_store import forget as delete
    from specexec.drafters.retrieval.suffix_index import Settled

    with lean_imports():
        from specexec.compose.context import encoding_of

    encoding = encoding_of(model, offline=offline, trust_remote_code=trust_remote_code)
    if forget:
        echo(f"forgot {len(delete(encoding.tokenizer))} files", err=True)
    if files:
        corpus = Settled.of(encoding.encode(_read(file)) for file in files)
        path = corpus_path(encoding.tokenizer)
        save(path, {"tokens": corpus.tokens_E, "order": corpus.order_E})
        tokens = format_count(len(corpus) - len(files))
        echo(f"indexed {len(files)} files, {tokens} tokens, for {model}: {path}", err=True)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise BadText(f"{file} is not UTF-8 text (byte {problem.start:,}).", hint="text files only.") from problem
