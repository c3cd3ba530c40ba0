"""Size and shape of the code: small functions, small files, no prints in the library, no pickle."""

import ast
import re
import statistics
from pathlib import Path

import pytest
from sources import CHECKOUT, Source, functions, package_sources, public_definitions

MAY_PRINT = {
    *(f"hpcinfer/{name}.py" for name in ("__main__", "run", "convert", "evaluate", "merge", "status", "inspect",
                                         "doctor", "calibrate", "supervise", "study")),
    "comm/world.py",  # the last words of a rank, before it ends all
    "hpcinfer/report/progress.py",  # lines instead of the bar when there is no terminal
}
MEDIAN_LINES, P90_LINES, MAX_LINES, MAX_FILE_LINES = 10, 34, 60, 400

SOURCES = package_sources()
SIZES = {f"{source.path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
         for source in SOURCES for node in functions(source.tree)}


def names_of(node: ast.AST) -> list[str]:
    """Modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def documented_names(docstring: str) -> list[str]:
    """Names under `Args:`."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)+)", docstring, re.MULTILINE)
    return re.findall(r"^    \*{0,2}(\w+)(?: \(.*?\))?:", section.group(1), re.MULTILINE) if section else []


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Parameters of a function; fields and `__init__` parameters of a class."""
    if isinstance(node, ast.ClassDef):
        fields = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
        made = [parameters(item) for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        return fields.union(*made)
    arguments = node.args
    starred = [each for each in (arguments.vararg, arguments.kwarg) if each]
    return {each.arg for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred]}


def test_functions_are_small() -> None:
    sizes = sorted(SIZES.values())
    assert statistics.median(sizes) <= MEDIAN_LINES
    assert sizes[int(len(sizes) * 0.9)] <= P90_LINES
    assert not {name: size for name, size in SIZES.items() if size > MAX_LINES}


def test_files_are_small() -> None:
    assert not {str(source.path): source.num_lines for source in SOURCES if source.num_lines > MAX_FILE_LINES}


def test_library_does_not_print() -> None:
    calls = [f"{source.path}:{node.lineno}" for source in SOURCES if str(source.path) not in MAY_PRINT
             for node in ast.walk(source.tree)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not calls


def test_nobody_pickles() -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    found = [f"{source.path}:{node.lineno}" for source in SOURCES for node in ast.walk(source.tree)
             if banned & {name.split(".")[0] for name in names_of(node)}]  # type: ignore[attr-defined]
    assert not found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_public_names_have_docstrings_that_match(source: Source) -> None:
    assert ast.get_docstring(source.tree) or not source.tree.body, f"{source.path}: no module docstring"
    for node in public_definitions(source.tree):
        docstring = ast.get_docstring(node)
        assert docstring, f"{source.path}:{node.lineno}: {node.name} has no docstring"
        unknown = set(documented_names(docstring)) - parameters(node)
        assert not unknown, f"{source.path}:{node.lineno}: {node.name} documents {unknown}, which it does not take"


def test_every_test_file_is_collected() -> None:
    def tests_in(path: Path) -> int:
        return sum(node.name.startswith("test_") for node in functions(ast.parse(path.read_text())))

    files = {path: tests_in(path) for path in (CHECKOUT / "tests").rglob("*.py")}
    assert not [str(path) for path, count in files.items() if path.name.startswith("test_") != bool(count)]
