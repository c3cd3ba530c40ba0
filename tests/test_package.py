"""The package at its edges: a quiet and quick import, help without MPI and torch, types, frozen flags."""

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
import time

import pytest
from sources import CHECKOUT

from hpcinfer.__main__ import COMMANDS, main

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mpi4py", "torch", "cupy", "transformers"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
"""
HEAVY = {"mpi4py", "torch", "h5py", "numpy", "tokenizers", "safetensors", "jinja2", "tqdm", "psutil"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python, outside the checkout."""
    argv = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd="/")


def hpcinfer_without_mpi(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line where neither MPI nor torch can be imported."""
    return python(BLOCKER + "from hpcinfer.__main__ import main\nsys.exit(main())", *arguments)


def test_import_writes_nothing_and_imports_little() -> None:
    run = python("import sys, hpcinfer; sys.exit(' '.join(sorted(sys.modules)))")
    assert not run.stdout
    assert not HEAVY & {name.split(".")[0] for name in run.stderr.split()}


def test_import_is_quick() -> None:
    def best_of(code: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert python(code).returncode == 0
            times.append(time.perf_counter() - start)
        return min(times)

    assert best_of("import hpcinfer") - best_of("pass") < 0.2  # seconds


def test_only_the_named_command_is_imported() -> None:
    code = "import sys; from hpcinfer.__main__ import main\ntry: main(['status', 'x'])\nexcept BaseException: pass"
    run = python(code + "\nsys.exit(' '.join(name for name in sys.modules if name.startswith('hpcinfer')))")
    commands = {f"hpcinfer.{name}" for name in COMMANDS} & set(run.stderr.split())
    assert commands == {"hpcinfer.status"}


def test_no_catalogue_of_translations_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for, exists = [], os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: looked_for.append(path) or exists(path))
    monkeypatch.setenv("LANG", "fr_FR.UTF-8")
    with pytest.raises(SystemExit):
        main(["run", "--no-such-option"])
    assert not looked_for and "LANGUAGE" not in os.environ


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_needs_neither_mpi_nor_torch(command: str) -> None:
    run = hpcinfer_without_mpi(*filter(None, [command]), "--help")
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    assert not command or re.search(rf"example:\n  .*hpcinfer[. ]{command}\b.*\n*\Z", run.stdout), run.stdout


def test_flags_of_run_are_frozen() -> None:
    text = hpcinfer_without_mpi("run", "--help").stdout
    lines = [line for line in text.splitlines() if re.match(r" {1,4}-", line)]
    declarations = (re.split(r" {2,}", line.strip())[0] for line in lines)  # without the help beside them
    flags = {flag for text in declarations for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)}
    frozen = (CHECKOUT / "tests/flags.txt").read_text().split()
    assert sorted(flags) == frozen, "a flag is a promise: argue for it, then change tests/flags.txt"


def test_types_are_installed_with_the_package() -> None:
    files = importlib.metadata.files("hpcinfer") or []
    if not any(file.name == "errors.py" for file in files):
        pytest.skip("installed editable")
    names = {str(file) for file in files}
    assert {"hpcinfer/py.typed", "hpcinfer/comm/__init__.py", "hpcinfer/partition/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("comm/", "partition/", "tests/"))]


def test_package_runs_from_a_checkout() -> None:
    run = subprocess.run([sys.executable, "-m", "hpcinfer", "--version"], capture_output=True, text=True, cwd=CHECKOUT)
    assert run.stdout == f"hpcinfer {importlib.metadata.version('hpcinfer')}\n", run.stderr


def test_native_kernels_of_the_installation_are_found_from_a_checkout() -> None:
    code = "from hpcinfer.kernels import Placement; from hpcinfer.kernels.native import create_native_kernels as create"
    argv = [sys.executable, "-c", f"{code}; print(create(Placement()) is not None)"]
    elsewhere, here = (
        subprocess.run(argv, capture_output=True, text=True, cwd=folder).stdout for folder in ("/", CHECKOUT)
    )
    assert elsewhere == here and here.strip() in ("True", "False")
