"""The house: arrows point one way, imports stay light, and everything exported is there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"cli": {"cli", "specexec", "offload"}, "specexec": {"specexec"}, "offload": {"offload"}}


def imported(file: Path) -> set[str]:
    """Top-level names of everything a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        allowed = ALLOWED[package] | ({"offload"} if file.parent == ROOT / "specexec" / "compose" else set())
        assert imported(file) & {"cli", "specexec", "offload", "tests", "scripts"} <= allowed, file


@pytest.mark.parametrize(
    "statement", ["import specexec", "import offload", "from specexec import SamplingParams, Burst"]
)
def test_importing_a_package_does_not_import_torch(statement: str) -> None:
    code = f"import sys; {statement}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("package", ["specexec", "offload"])
def test_threads_do_not_spin_while_weights_are_read_unless_the_user_wants_it(package: str) -> None:
    code = f"import os, {package}; print(os.environ['GOMP_SPINCOUNT'])"
    for own, seen in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | own
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
        assert run.stdout.strip() == seen


def test_every_exported_name_exists() -> None:
    import offload
    import specexec

    for package in (specexec, offload):
        for name in package.__all__:
            assert getattr(package, name) is not None
