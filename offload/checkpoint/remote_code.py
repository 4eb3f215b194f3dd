"""Python that a checkpoint brings along for transformers to run. None of it runs without the user's permission.

Only code that lies in the model's own folder is ever run, never what the folder points at elsewhere. Knows no torch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from offload.checkpoint.documents import Json, read_json
from offload.errors import OffloadError, RemoteCode, UnsupportedModel

SAYING_SO = ("config.json", "tokenizer_config.json")


def references(path: Path) -> dict[str, list[str]]:
    """For each auto class of transformers the classes that the folder defines for it, as module.Class."""
    found: dict[str, list[str]] = {}
    for name in SAYING_SO:
        if (path / name).is_file():
            found |= classes_in(read_json(path / name))
    return found


def classes_in(settings: Mapping[str, Json]) -> dict[str, list[str]]:
    """The same of one file."""
    auto_map, found = settings.get("auto_map"), {}
    for kind, given in auto_map.items() if isinstance(auto_map, dict) else []:
        classes = given if isinstance(given, list) else [given]  # tokenizers come as slow and fast
        found[kind] = [one for one in classes if isinstance(one, str)]
    return found


def code_files(path: Path) -> list[str]:
    """The Python files that the folder names; those may import others beside them."""
    named = {one.rpartition(".")[0] for classes in references(path).values() for one in classes if "--" not in one}
    return sorted(f"{module}.py" for module in named if module)


def refused(path: Path) -> RemoteCode:
    """What to say where a model cannot be read without its code, and the user has not allowed that."""
    files = ", ".join(code_files(path)) or "Python files"
    return RemoteCode(
        f"{path} brings code of its own ({files}), and none of it was run.",
        "transformers does not know this model without it. Such code can do all that you can: read, send, delete.",
        "read it first; if you trust its author: --trust-remote-code",
    )


def refuse_elsewhere(path: Path) -> None:
    """Raises RemoteCode for a folder whose code is in another repository, where it may change unnoticed."""
    for classes in references(path).values():
        for one in classes:
            if "--" in one:
                raise RemoteCode(
                    f"{path} wants to run code of another repository, {one.partition('--')[0]}.",
                    "Only code that lies beside the weights is run, and only with --trust-remote-code.",
                    "copy the Python files into the folder and name them in auto_map without the repository.",
                )


@contextmanager
def running_code(path: Path, trusted: bool) -> Iterator[None]:
    """While transformers may run the folder's code: whatever that raises becomes a refusal with its name on it."""
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:
        if trusted and references(path):
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise UnsupportedModel(
                f"the code that {path} brings does not work here.", f"{type(error).__name__}: {first}"
            ) from error
        if "trust_remote_code" in str(error):  # transformers' own refusal, for want of the flag
            raise refused(path) from error
        raise
