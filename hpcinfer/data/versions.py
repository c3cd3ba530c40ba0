"""Versions of what makes prompts and records: another one may write other bytes for the same row."""

from __future__ import annotations

import json
import os
import sys
from typing import NamedTuple

_LIBRARIES = ("tokenizers", "jinja2")


class _Installed(NamedTuple):
    """A library as one rank found it."""

    version: str
    folder: str  # of its metadata, which names the version; empty if unknown


def find_libraries() -> bytes:
    """Search this rank's folders for the libraries, and say where they are, for other ranks' `profile`."""
    return json.dumps([sys.path, {name: _find(name) for name in _LIBRARIES}]).encode()


def profile(told: bytes | None = None) -> dict[str, str]:
    """Name the interpreter and the libraries that fix the bytes of prompts and records.

    Args:
        told: what another rank's `find_libraries` says. A library that is there here, too, is not searched for.
    """
    path, found = json.loads(told) if told else (None, {})
    installed = {name: _Installed(*values) for name, values in found.items() if path == sys.path}
    versions = {name: _confirm(installed[name]) if name in installed else None for name in _LIBRARIES}
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python, **{name: known or _find(name).version for name, known in versions.items()}}


def _find(name: str) -> _Installed:
    from importlib.metadata import distribution

    found = distribution(name)
    folder = str(found.locate_file(f"{name}-{found.version}.dist-info"))
    return _Installed(found.version, folder if os.path.isdir(folder) else "")


def _confirm(there: _Installed) -> str | None:
    """The version, if it is what this rank has as well."""
    return there.version if there.folder and os.path.isdir(there.folder) else None
