"""The house: imports between packages and folders point one way and stay light; everything exported exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"cli": {"cli", "specexec", "offload"}, "specexec": {"specexec"}, "offload": {"offload"}}
MOST_MODULES = 20  # in one folder, beside its __init__.py

# What each folder may import. `.name` is a folder or module of the same package, a package's own name what it exports.
# An inner folder counts with the one around it. A new arrow belongs here only if the folder's docstring allows it.
ARROWS = """
offload.errors:
offload.units:
offload.machine:      .errors .units
offload.checkpoint:   .errors .units .machine
offload.hub:          .errors .units .machine .checkpoint
offload.placement:    .errors .units .machine .checkpoint
offload.stream:       .errors .units .machine .checkpoint .placement
offload.model:        .errors .units .machine .checkpoint .placement .stream
offload.packs:        .errors .units .machine .checkpoint .placement .hub .model
offload.measure:      .machine .checkpoint .stream
specexec.errors:
specexec.sizes:       .errors
specexec.pieces:
specexec.tree:
specexec.learned:     .tree
specexec.stats:       .pieces .tree
specexec.sampling:    .errors .sizes .stats .tree
specexec.model:       .errors .sizes .tree
specexec.text:        .errors .sizes .pieces .stats .tree .sampling .model
specexec.drafters:    .errors .sizes .learned .tree .sampling .model .text
specexec.planning:    .errors .sizes .tree .text .drafters
specexec.lossy:       .errors .sizes .tree .sampling .model .text .drafters .planning
specexec.engine:      .errors .sizes .learned .stats .tree .sampling .model .text .drafters .planning
specexec.evaluation:  .errors .tree .sampling .model .text .engine
specexec.distill:     .errors .stats .drafters .engine .model .sampling .sizes
specexec.compose:     .errors .sizes .sampling .model .text .drafters .planning .lossy .engine .distill offload
specexec.__main__:
cli.shared:           specexec specexec.errors specexec.sizes specexec.sampling specexec.text specexec.drafters
                      specexec.lossy specexec.engine specexec.compose
                      offload offload.errors offload.machine offload.hub offload.placement
cli.terminal:         .shared specexec.errors specexec.stats specexec.tree specexec.text specexec.engine offload.machine
cli.openai:           .shared specexec.errors specexec.stats specexec.sampling specexec.text specexec.engine
cli.messages_api:     .openai specexec.text
cli.responses_api:    .openai specexec.pieces specexec.text
cli.ollama_api:       .openai specexec.text
cli.engine:           .shared .terminal specexec specexec.errors specexec.sizes specexec.model specexec.drafters
                      specexec.engine specexec.compose
                      offload offload.errors offload.machine offload.checkpoint offload.hub offload.placement
cli.about:            .shared offload.machine
cli.connect:          .shared .terminal specexec.pieces specexec.stats specexec.tree specexec.sampling specexec.text
                      offload.machine
cli.mcp:              .shared .terminal specexec.text offload.machine
cli.chat:             .shared .terminal .engine .connect .mcp specexec.pieces specexec.stats specexec.sampling
                      specexec.model specexec.text specexec.drafters specexec.engine specexec.sizes
                      offload.machine offload.hub
cli.serve:            .shared .terminal .engine .connect .openai .messages_api .responses_api .ollama_api
                      specexec.errors specexec.stats specexec.sampling specexec.model
                      specexec.text specexec.engine specexec.compose offload.errors offload.machine
cli.models:           .shared .terminal .engine .about specexec.errors specexec.sizes specexec.model specexec.text
                      specexec.drafters
                      specexec.compose offload.errors offload.units offload.machine offload.checkpoint offload.hub
                      offload.placement offload.packs offload.measure
cli.batch:            .shared .terminal .engine .connect .openai .models specexec.errors specexec.pieces
                      specexec.stats specexec.tree specexec.sampling specexec.text specexec.drafters specexec.engine
                      specexec.compose offload.machine offload.checkpoint offload.hub
cli.distill:          .shared .terminal .engine .batch specexec.errors specexec.sampling specexec.engine
                      specexec.distill specexec.compose offload.errors offload.machine offload.checkpoint offload.hub
cli.bench:            .shared .terminal .engine .batch specexec.errors specexec.stats specexec.sampling specexec.model
                      specexec.text specexec.drafters specexec.engine specexec.evaluation offload.hub
cli.app:              .shared offload.machine
"""


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


def folders() -> list[Path]:
    """Every folder of the three packages that holds modules."""
    return sorted({file.parent for package in ALLOWED for file in (ROOT / package).rglob("*.py")})


def import_graph() -> dict[str, set[str]]:
    """Which second-level folders import which, also inside functions and for types alone."""
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for folder in folders()
        for file in folder.glob("*.py")
    }
    graph: dict[str, set[str]] = defaultdict(set)
    for module, file in modules.items():
        if module in ALLOWED:
            continue  # a package's own names, for the world outside
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= (inner & modules.keys()) | ({node.module} if inner - modules.keys() else set())
        graph[second_level(module)] |= {second_level(name) for name in names & modules.keys()} - {second_level(module)}
    return dict(graph)


def second_level(module: str) -> str:
    """`specexec.drafters` of `specexec.drafters.retrieval.memory`."""
    return ".".join(module.split(".")[:2])


def allowed_arrows() -> dict[str, set[str]]:
    """The table above, names in full."""
    table: dict[str, set[str]] = {}
    for name, rest in re.findall(r"^(\S+):((?:[^\n]|\n )*)$", ARROWS, re.MULTILINE):
        package = name.partition(".")[0]
        table[name] = {f"{package}{one}" if one.startswith(".") else one for one in rest.split()}
    return table


def test_no_folder_imports_itself_by_way_of_another() -> None:
    TopologicalSorter(import_graph()).prepare()  # raises CycleError, which names the cycle


def test_folders_import_what_the_table_allows() -> None:
    allowed, graph = allowed_arrows(), import_graph()
    assert allowed.keys() == graph.keys()
    assert {folder: found - allowed[folder] for folder, found in graph.items() if found - allowed[folder]} == {}


def test_the_table_of_arrows_has_no_cycle_either() -> None:
    TopologicalSorter(allowed_arrows()).prepare()


def test_no_folder_holds_more_modules_than_a_reader_keeps_in_mind() -> None:
    sizes = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) - 1 for folder in folders()}
    assert {folder: size for folder, size in sizes.items() if size > MOST_MODULES} == {}


def test_every_folder_and_module_says_what_it_is() -> None:
    for folder in folders():
        assert (folder / "__init__.py").exists(), folder
        for file in folder.glob("*.py"):
            assert ast.get_docstring(ast.parse(file.read_text())), file


@pytest.mark.parametrize(
    "statement",
    [
        "import specexec",
        "import offload",
        "from specexec import SamplingParams, Burst",
        "from specexec.engine.prefixes import NoPrefixes",
    ],
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


def test_no_public_class_name_means_two_things() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for file in (file for folder in folders() for file in folder.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
