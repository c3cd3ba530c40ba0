"""Modules that the root has imported are there for the other ranks, though the file system has them no more."""

import compileall
import importlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcinfer.agree import on_root
from hpcinfer.comm.imports import share_imports
from hpcinfer.comm.protocol import World
from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.world import start_world
from hpcinfer.errors import PeerError

NAME = "lent_package"
SOURCES = {
    "__init__.py": "from lent_package import leaf\nvalue = 'package'\n",
    "leaf.py": "import lent_package.inner.deep\nvalue = __name__\ndef fail():\n    raise ValueError('of the leaf')\n",
    "inner/__init__.py": "",
    "inner/deep.py": "value = __file__\n",
    "unused.py": "",
}


@pytest.fixture(scope="module")
def world() -> World:
    return start_world()


@pytest.fixture
def package(world: World) -> Iterator[Path]:
    """A package on the search path of all ranks; nothing of it is left afterwards."""
    path, finders = list(sys.path), list(sys.meta_path)
    folder = Path(on_root(world, lambda: tempfile.mkdtemp().encode()).decode())
    if world.rank == 0:
        for name, text in SOURCES.items():
            (folder / NAME / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / NAME / name).write_text(text)
    world.barrier()
    sys.path.insert(0, str(folder))
    yield folder / NAME
    sys.path[:], sys.meta_path[:] = path, finders
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(folder)


def take_away(world: World, package: Path) -> None:
    """Leave nothing of the package on the file system, so that it can come from nowhere but the root."""
    world.barrier()
    if world.rank == 0:
        package.rename(package.with_name("hidden"))
    world.barrier()


@pytest.mark.mpi(min_size=2)
def test_what_the_root_imported_needs_no_file(world: World, package: Path) -> None:
    share_imports(world, [NAME])
    assert (NAME in sys.modules) == (world.rank == 0)
    take_away(world, package)
    lent = importlib.import_module(NAME)
    deep = importlib.import_module(f"{NAME}.inner.deep")
    assert (lent.value, lent.leaf.value) == ("package", f"{NAME}.leaf")
    assert lent.__path__ == [str(package)] and lent.leaf.__spec__.origin == str(package / "leaf.py")
    assert deep.value == str(package / "inner" / "deep.py")


@pytest.mark.mpi(min_size=2)
def test_bytecode_is_lent_where_it_is_there(world: World, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if world.rank == 0:
        assert compileall.compile_dir(package, quiet=1)
    monkeypatch.setattr(SourceFileLoader, "source_to_code", None)  # no rank compiles anything
    share_imports(world, [NAME])
    take_away(world, package)
    assert importlib.import_module(NAME).leaf.value == f"{NAME}.leaf"


@pytest.mark.mpi(min_size=2)
def test_a_traceback_shows_the_source_where_it_was(world: World, package: Path) -> None:
    share_imports(world, [NAME])
    try:
        importlib.import_module(NAME).leaf.fail()
    except ValueError:
        assert "raise ValueError('of the leaf')" in traceback.format_exc()


@pytest.mark.mpi(min_size=2)
def test_what_the_root_has_not_imported_is_found_as_ever(world: World, package: Path) -> None:
    share_imports(world, [NAME])
    assert importlib.import_module(f"{NAME}.unused").__file__ == str(package / "unused.py")


@pytest.mark.mpi(min_size=2)
def test_a_rank_with_another_search_path_imports_by_itself(world: World, package: Path) -> None:
    if world.rank == 1:
        sys.path.append(str(package.parent / "more"))
    share_imports(world, [NAME])
    take_away(world, package)
    if world.rank == 1:
        importlib.invalidate_caches()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(NAME)
    else:
        assert importlib.import_module(NAME).value == "package"


@pytest.mark.mpi(min_size=2)
def test_a_rank_whose_copy_of_a_package_is_another_one_imports_it_by_itself(
    world: World, package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, where = os.stat, str(package / "__init__.py")

    def elsewhere(path: str, **flags: Any) -> Any:
        """What this rank's node says of its file: it was written later."""
        found = real(path, **flags)
        if str(path) != where:
            return found
        return SimpleNamespace(st_mtime=found.st_mtime + 5, st_size=found.st_size, st_mode=found.st_mode)

    finders = len(sys.meta_path)
    with monkeypatch.context() as patch:
        if world.rank == 1:
            patch.setattr(os, "stat", elsewhere)
        share_imports(world, [NAME])
    assert len(sys.meta_path) - finders == (world.rank not in (0, 1))
    assert ("another copy" in caplog.text and where in caplog.text) == (world.rank == 1)
    assert importlib.import_module(NAME).value == "package"


@pytest.mark.mpi(min_size=2)
def test_extension_modules_are_loaded_from_where_the_root_found_them(world: World) -> None:
    finders, held = list(sys.meta_path), sys.modules.pop("_xxtestfuzz", None)
    try:
        share_imports(world, ["_xxtestfuzz"])
        found = importlib.import_module("_xxtestfuzz")
        assert found.__spec__ is not None and (found.__spec__.origin or "").endswith(".so")
    except (ImportError, PeerError):
        pytest.skip("this Python is built without its test modules")
    finally:
        sys.meta_path[:] = finders
        if held is not None:
            sys.modules["_xxtestfuzz"] = held


@pytest.mark.mpi(min_size=2)
def test_a_module_that_is_not_there_fails_everywhere(world: World) -> None:
    finders = list(sys.meta_path)
    with pytest.raises(ModuleNotFoundError if world.rank == 0 else PeerError, match="no_such_module"):
        share_imports(world, ["no_such_module"])
    assert sys.meta_path == finders


def test_one_rank_alone_imports_nothing_ahead() -> None:
    share_imports(SerialGroup(), ["no_such_module"])
