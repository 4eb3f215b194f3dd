"""Python's own documentation as text to learn from. Knows nothing of dialogues or models.

A function of Python's standard library alone, so the same interpreter gives the same bytes.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics  # type: ignore[import-untyped, unused-ignore]  # no stubs for this data module


@dataclass(frozen=True)
class Entry:
    """One documented name of the standard library and the first sentence about it."""

    name: str
    kind: str
    summary: str


def fingerprint(texts: Iterator[str]) -> str:
    """sha256 over all texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def stdlib_modules() -> list[Path]:
    """Python's own modules in a fixed order, without tests and bundled third-party code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "ensurepip",
        "pydoc_data",
        "turtledemo",
        "__pycache__",
    }
    found = (path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts))
    # Files such as _sysconfigdata_* hold facts of one machine.
    return sorted(path for path in found if "_sysconfigdata" not in path.name and "__main__" not in path.name)


def documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str, str]]:
    """(dotted name, kind, docstring) of a module and of its public classes, methods and functions."""
    kinds = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}
    stack: list[tuple[str, str, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]] = [
        (module, "module", tree)
    ]
    while stack:
        name, kind, node = stack.pop()
        if text := ast.get_docstring(node):
            yield name, kind, text
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in reversed(node.body):
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
                    method = isinstance(node, ast.ClassDef) and not isinstance(child, ast.ClassDef)
                    stack.append((f"{name}.{child.name}", "method" if method else kinds[type(child)], child))


@dataclass(frozen=True)
class Document:
    """One module or language topic, and the names it documents."""

    text: str
    entries: tuple[Entry, ...]


@cache
def documentation() -> tuple[Document, ...]:
    """One document per module, then one per topic of the language reference."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    for path in stdlib_modules():
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files are deliberately broken or in other encodings
            continue
        found = list(documented(tree, module))
        entries = tuple(entry for entry in (summarised(*each) for each in found) if entry)
        if found:
            documents.append(Document("\n\n".join(f"{name}\n{text}" for name, _, text in found), entries))
    return (*documents, *(Document(topics.topics[name], ()) for name in sorted(topics.topics)))


def summarised(name: str, kind: str, text: str) -> Entry | None:
    """The first sentence of a docstring, if it is an answer by itself."""
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."
    usable = 15 <= len(sentence) <= 110 and sentence.isascii() and "_" not in name and sentence[0].isupper()
    return Entry(name, kind, sentence) if usable else None
