"""The checkout's sources, as the tests of layers, style and documents read them."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("hpcinfer", "comm", "partition")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """One file of the package."""

    path: Path  # relative to the checkout
    module: str  # as installed
    tree: ast.Module
    num_lines: int

    @property
    def is_package(self) -> bool:
        """Whether the module is a folder."""
        return self.path.name == "__init__.py"


def package_sources() -> list[Source]:
    """Everything that installs as hpcinfer, by path."""
    paths = (path for name in PACKAGES for path in (CHECKOUT / name).rglob("*.py"))
    return [_source(path) for path in sorted(paths)]


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Classes, functions and methods whose names, and whose class's name, do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (item for item in node.body if isinstance(item, Function) and item.name[0] != "_")


def _source(path: Path) -> Source:
    text, relative = path.read_text(), path.relative_to(CHECKOUT)
    parts = relative.with_suffix("").parts
    parts = parts if parts[0] == "hpcinfer" else ("hpcinfer", *parts)
    return Source(relative, ".".join(parts).removesuffix(".__init__"), ast.parse(text), text.count("\n"))
