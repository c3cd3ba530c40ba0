"""Modules that the root reads from the file system, and all other ranks from the root.

A thousand ranks that import the same modules ask a shared file system some four thousand times each. Here the root
imports them first; the others get the files that it has read in one broadcast, and find extension modules without a
search. What the root has not imported is imported as ever, from the same folders: where these hold another copy the two
must not be mixed. So each rank compares its copies with the root's as Python compares bytecode with its source, by time
and size, one file for each package.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source, spec_from_file_location
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from hpcinfer.agree import on_root

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

logger = logging.getLogger(__name__)

_LENGTH_BYTES = 8  # of the packed text, before it


class _Found(NamedTuple):
    """A module as the root found it."""

    origin: str
    folders: list[str] | None  # of a package
    stats: dict[str, Any] | None  # time and size of the source; None for an extension module
    files: dict[str, bytes]  # what was read for it: the bytecode, or the source where there is none


def share_imports(group: Collectives, names: Sequence[str]) -> None:
    """Import modules on the root, and let the other ranks import the same, and what these import, from its memory.

    Collective over `group`. The other ranks import nothing yet. A rank whose interpreter, search path or copy of a
    package differs from the root's goes on by itself, with a warning where it is the copy.

    Args:
        group: ranks that start together.
        names: modules to begin with.
    """
    if group.size == 1:
        return
    data = on_root(group, lambda: _pack(_import_all(names)))
    if group.rank != 0:
        interpreter, modules = _unpack(data)
        if interpreter == _interpreter() and not _is_other_copy(modules):
            _install(_Told(modules))


def _is_other_copy(modules: Mapping[str, _Found]) -> bool:
    """Whether a package that lies in a folder of the search path is another copy here than on the root."""
    first: dict[str, _Found] = {}  # of each package; modules outside of packages are the interpreter's own
    for name, found in modules.items():
        if found.stats and (found.folders is not None or "." in name):
            first.setdefault(name.partition(".")[0], found)
    for found in first.values():
        if not _is_same_file(found.origin, found.stats or {}):
            logger.warning("%s is another copy on %s than on the root's node: this rank imports its own modules",
                           found.origin, os.uname().nodename)  # fmt: skip
            return True
    return False


def _is_same_file(path: str, stats: Mapping[str, Any]) -> bool:
    try:
        own = os.stat(path)
    except OSError:
        return False
    return (own.st_mtime, own.st_size) == (stats["mtime"], stats["size"])


def _import_all(names: Iterable[str]) -> dict[str, _Found]:
    """Import modules; return all that had to be found for it."""
    with _recording() as modules:
        for name in names:
            importlib.import_module(name)
    return modules


def _interpreter() -> list[Any]:
    """What must be equal for the root's modules to be those that this rank would find; JSON values."""
    return [sys.version, list(sys.path), sys.prefix, sys.flags.optimize, os.uname().machine]


def _pack(modules: Mapping[str, _Found]) -> bytes:
    text = json.dumps([_interpreter(), {
        name: [found.origin, found.folders, found.stats, {path: len(data) for path, data in found.files.items()}]
        for name, found in modules.items()
    }]).encode()  # fmt: skip
    files = [data for found in modules.values() for data in found.files.values()]
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *files])


def _unpack(data: bytes) -> tuple[list[Any], dict[str, _Found]]:
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    interpreter, table = json.loads(data[_LENGTH_BYTES:start])
    modules = {}
    for name, (origin, folders, stats, sizes) in table.items():
        files = {}
        for path, size_bytes in sizes.items():
            files[path] = data[start : start + size_bytes]
            start += size_bytes
        modules[name] = _Found(origin, folders, stats, files)
    return interpreter, modules


@contextmanager
def _recording() -> Iterator[dict[str, _Found]]:
    """Note what is imported."""
    recorder = _Recorder()
    _install(recorder)
    try:
        yield recorder.modules
    finally:
        sys.meta_path.remove(recorder)


def _install(finder: _Told | _Recorder) -> None:
    """Have a finder asked just before the file system is."""
    finders = sys.meta_path
    finders.insert(finders.index(PathFinder) if PathFinder in finders else len(finders), finder)


class _Recorder:
    """Finds modules as ever, and notes where they were and what was read."""

    def __init__(self) -> None:
        self.modules: dict[str, _Found] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module in a folder of the search path; None for all that lies elsewhere."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None:
            return None
        if type(spec.loader) is SourceFileLoader:
            found = self.modules[name] = _Found(spec.origin, _copy(spec.submodule_search_locations), {}, {})
            spec.loader = _RecordingLoader(name, found)
        elif isinstance(spec.loader, ExtensionFileLoader):
            self.modules[name] = _Found(spec.origin, _copy(spec.submodule_search_locations), None, {})
        return spec


class _RecordingLoader(SourceFileLoader):
    def __init__(self, name: str, found: _Found) -> None:
        super().__init__(name, found.origin)
        self._found: _Found | None = found

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        stats = super().path_stats(path)
        if self._found is not None and self._found.stats is not None:
            self._found.stats.update(stats)
        return stats

    def get_data(self, path: str) -> bytes:
        data = super().get_data(path)
        if self._found is not None:
            self._found.files[path] = data
        return data

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._found = None  # what is read later is no part of the import


class _Told:
    """Finds the modules that the root has told of."""

    def __init__(self, modules: dict[str, _Found]) -> None:
        self._modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module without asking the file system; None for those that the root did not import."""
        found = self._modules.get(name)
        if found is None:
            return None
        kind = _ToldLoader(name, found) if found.stats is not None else ExtensionFileLoader(name, found.origin)
        folders = _copy(found.folders)
        return spec_from_file_location(name, found.origin, loader=kind, submodule_search_locations=folders)


class _ToldLoader(SourceFileLoader):
    """Reads what the root has read for a module; all else, as the source for a traceback, is where it was."""

    def __init__(self, name: str, found: _Found) -> None:
        super().__init__(name, found.origin)
        self._found = found

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        return self._found.stats or {}

    def get_data(self, path: str) -> bytes:
        if path in self._found.files:
            return self._found.files[path]
        if path == cache_from_source(self._found.origin):
            raise FileNotFoundError(path)  # the root has found no bytecode
        return super().get_data(path)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._found.files.clear()  # some megabytes in all

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Write no bytecode: the root has done so, where it may be written."""


def _copy(folders: Iterable[str] | None) -> list[str] | None:
    return None if folders is None else list(folders)
