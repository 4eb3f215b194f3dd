"""The program with one wait or one record taken out: what a test of order has to notice."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from unittest.mock import patch

ORDER = {"wait_event", "wait_stream", "record", "synchronize", "ready_to_fill", "receive", "release", "settle"}
"""Calls that say what waits for what."""


@dataclass(frozen=True)
class Mutant:
    """One call less."""

    owner: type
    method: str
    call: str
    line: int
    changed: FunctionType

    @property
    def name(self) -> str:
        """Where, and which call is missing."""
        return f"{self.owner.__name__}.{self.method} without {self.call}"

    def in_place(self) -> AbstractContextManager[object]:
        """The program is the mutant meanwhile."""
        return patch.object(self.owner, self.method, self.changed)


def mutants(module: ModuleType) -> Iterator[Mutant]:
    """Every method of the module's classes without one of its calls that order something."""
    for owner in vars(module).values():
        if inspect.isclass(owner) and owner.__module__ == module.__name__:
            for name, method in vars(owner).items():
                if inspect.isfunction(method) and method.__code__.co_filename == module.__file__:
                    yield from _without_one(module, owner, name, method)


def _without_one(module: ModuleType, owner: type, name: str, method: FunctionType) -> Iterator[Mutant]:
    source = textwrap.dedent(inspect.getsource(method))
    for line, call in _calls(ast.parse(source)):
        tree = ast.parse(source)
        ast.fix_missing_locations(_Removed(line).visit(tree))
        made: dict[str, FunctionType] = {}
        exec(compile(tree, f"<{owner.__name__}.{name} without {call}>", "exec"), vars(module), made)
        yield Mutant(owner, name, call, line, made[name])


def _calls(tree: ast.Module) -> list[tuple[int, str]]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return [(node.lineno, ast.unparse(node.value)) for node in found if _orders(node)]


def _orders(node: ast.Expr) -> bool:
    call = node.value
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ORDER


class _Removed(ast.NodeTransformer):
    def __init__(self, line: int) -> None:
        self._line = line

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return ast.Pass() if node.lineno == self._line and _orders(node) else node
