"""Imports run downward only; the order is that of docs/architecture.md, and every module has its place in it."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from sources import Source, package_sources

LAYERS: tuple[tuple[str, ...], ...] = (  # from top to bottom; modules of one layer do not import each other
    ("__main__",),
    ("run", "convert", "evaluate", "merge", "status", "inspect", "supervise", "doctor", "calibrate", "plan", "study"),
    ("cli",),
    ("scaling",),
    ("supervision",),
    ("recovery", "diagnosis"),
    ("engine",),
    ("model",),
    ("comm", "kernels", "weights", "data", "planner"),
    ("config",),
    ("dtypes", "agree"),
    ("partition", "report"),
    ("units", "log"),
    ("errors",),
    ("",),  # hpcinfer/__init__.py
)
ONLY_IN = {"mpi4py": "comm", "cupy": "comm", "torch": "kernels"}  # who may import it

LEVELS = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}


class Import(NamedTuple):
    """One import that happens at run time."""

    source: Source
    line: int
    target: str  # module, or module.attribute

    def __str__(self) -> str:
        return f"{self.source.path}:{self.line}: {self.source.module} imports {self.target}"


def imports_of(source: Source) -> Iterator[Import]:
    """Imports of a file, lazy ones too."""
    for node in run_time_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(source, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(source, node)
            yield from (Import(source, node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = (name.value for name in node.args[:1] if isinstance(name, ast.Constant))
            yield from (Import(source, node.lineno, str(name)) for name in names)


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, leaving out what only type checkers read, and the start of a command file (`python -m`)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith(("TYPE_CHECKING", "__name__ == '__main__'")):
            for other in node.orelse:
                yield other
                yield from run_time_nodes(other)
        else:
            yield node
            yield from run_time_nodes(node)


def absolute_name(source: Source, node: ast.ImportFrom) -> str:
    """The module that `from … import` names."""
    if not node.level:
        return node.module or ""
    package = source.module.split(".") if source.is_package else source.module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def part_of(name: str) -> str:
    """The part of the house that a dotted name under hpcinfer belongs to; "" for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVELS else ""


def violation(found: Import) -> str:
    """What is wrong with an import; "" if nothing."""
    importer, top = part_of(found.source.module), found.target.split(".")[0]
    if top in ONLY_IN and importer != ONLY_IN[top]:
        return f"{found}: only {ONLY_IN[top]} may"
    if top != "hpcinfer":
        return ""
    imported = part_of(found.target)
    if importer == imported or LEVELS[imported] < LEVELS[importer]:
        return ""
    return f"{found}: {imported} is not below {importer}"


SOURCES = package_sources()


def test_every_module_has_a_layer() -> None:
    names = {source.module.split(".")[1] for source in SOURCES if "." in source.module}
    assert names <= set(LEVELS), f"give {sorted(names - set(LEVELS))} a place in LAYERS and in docs/architecture.md"


def test_imports_run_downward() -> None:
    wrong = [violation(found) for source in SOURCES for found in imports_of(source)]
    assert not list(filter(None, wrong)), "\n".join(filter(None, wrong))


def test_modules_have_no_import_cycle() -> None:
    modules = {source.module for source in SOURCES}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for source in SOURCES:
        for found in imports_of(source):
            owner = found.target if found.target in modules else found.target.rpartition(".")[0]
            graph[source.module] |= {owner} & modules - {source.module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("code, verdict", [
    ("import torch", "only kernels may"),
    ("def f():\n    from mpi4py import MPI", "only comm may"),
    ("from hpcinfer.engine import loop", "engine is not below data"),
    ("from hpcinfer import kernels", "kernels is not below data"),
    ("from ..comm import world", "comm is not below data"),
    ("import importlib\nimportlib.import_module('hpcinfer.run')", "run is not below data"),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hpcinfer.comm import protocol", ""),
    ("from hpcinfer.errors import ConfigError\nfrom hpcinfer import __version__\nfrom . import rows\nimport h5py", ""),
])
def test_rule_sees_each_kind_of_import(code: str, verdict: str) -> None:
    sample = Source(Path("hpcinfer/data/sample.py"), "hpcinfer.data.sample", ast.parse(code), 1)
    found = "".join(violation(each) for each in imports_of(sample))
    assert found.endswith(verdict) if verdict else not found
