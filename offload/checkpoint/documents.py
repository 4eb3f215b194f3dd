"""The documents of a checkpoint: JSON and text that say what its weights mean. Read whole, or refused by name.

Documents are checked before another library reads the folder: that library's own messages do not name the file, or it
does not fail at all.
"""

import json
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias, cast

from offload.errors import BadModelDir
from offload.machine.file_identity import Stamp

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
OBJECTS = (
    CONFIG, "generation_config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "hf_quant_config.json", "manifest.json",
)  # fmt: skip
TEMPLATE = "chat_template.jinja"
TEXTS = (TEMPLATE, "merges.txt", "vocab.txt")
AGAIN = "specexec pull, which fetches damaged files anew; in a folder of your own, copy the file there again."


def read_json(file: Path) -> dict[str, Json]:
    """The JSON object in a file. Raises BadModelDir."""
    return json_object(read_text(file), str(file))


def json_object(text: str | bytes, name: str) -> dict[str, Json]:
    """The JSON object that the text of a file is. Raises BadModelDir with the file's `name`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else f"{error}"
        why = why if text.strip() else "it is empty"
        raise BadModelDir(f"{name} cannot be read as JSON: {why}.", None, AGAIN) from error
    if not isinstance(content, dict):
        raise BadModelDir(f"{name} is not a JSON object.", hint=AGAIN)
    return cast("dict[str, Json]", content)


def read_text(file: Path) -> str:
    """The text in a file. Raises BadModelDir."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would let us wait for ever
        with os.fdopen(fd, "rb") as opened:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadModelDir(f"{file} is not a regular file.", hint=AGAIN)
            return opened.read().decode()
    except UnicodeDecodeError as error:
        raise BadModelDir(f"{file} is not UTF-8 text: {error}.", hint=AGAIN) from error
    except OSError as error:
        raise BadModelDir(f"{file} cannot be read: {error.strerror}.", hint=AGAIN) from error


def templates_in(path: Path) -> list[str]:
    """The chat templates of a folder, from wherever they are written. Raises BadModelDir."""
    named = sorted((path / "additional_chat_templates").glob("*.jinja"))
    found: list[Json] = [read_text(file) for file in (path / TEMPLATE, *named) if os.path.lexists(file)]
    for name in ("tokenizer_config.json", "chat_template.json"):
        given = read_json(path / name).get("chat_template") if os.path.lexists(path / name) else None
        found += [one.get("template") for one in given if isinstance(one, dict)] if isinstance(given, list) else [given]
    return [one for one in found if isinstance(one, str)]


def check_documents(path: Path) -> None:
    """Raise BadModelDir for a document of the folder that is damaged; absent ones are not looked for.

    One that was found whole is not read again while the system says that nothing was written to it.
    """
    for name in (*OBJECTS, *TEXTS):
        if os.path.lexists(file := path / name):
            _check_document(file, _stamp(file))


@lru_cache(maxsize=1024)  # what is raised is not kept
def _check_document(file: Path, _: Stamp | None) -> None:
    if file.name in OBJECTS:
        read_json(file)
    elif not read_text(file) and file.suffix == ".jinja":
        raise BadModelDir(f"{file} is empty.", hint=AGAIN)


def _stamp(file: Path) -> Stamp | None:
    try:
        return Stamp.of(file.stat())
    except OSError:  # reading it says why
        return None
