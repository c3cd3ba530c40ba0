"""The manifest: what a job is. The first start writes it, later starts must agree with it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpcinfer.agree import on_all, on_root
from hpcinfer.errors import JobDirectoryError, ManifestError
from hpcinfer.recovery.durable import publish_bytes
from hpcinfer.recovery.layout import JobPaths

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

FORMAT_VERSION = 1
INFORMATIVE = "informative"  # the section that may differ from start to start

Manifest = dict[str, Any]


def open_manifest(paths: JobPaths, values: Manifest, group: Collectives,
                  pinned: Mapping[str, Any] | None = None) -> Manifest:
    """Write the manifest at the first start of a job, compare with it at every later one.

    Collective over the group; only root's values count.

    Args:
        values: sections by name; JSON values.
        pinned: dotted key to the value that the first start gives it where `values` has None there;
            later starts with None take the manifest's.

    Returns:
        The manifest as it is stored.

    Raises:
        ManifestError: the job directory belongs to another job; every difference is named.
        JobDirectoryError: the job directory is there and cannot be written.
    """
    manifest: Manifest = json.loads(on_root(group, lambda: _open(paths, values, pinned or {})))
    on_all(group, lambda: _share_files(paths))
    return manifest


def _share_files(paths: JobPaths) -> None:
    """Let those who may use the job directory use what this process makes inside, whatever its umask."""
    umask = os.umask(0o077)
    os.umask(umask & ~(paths.root.stat().st_mode & 0o077))


def _require_writable(paths: JobPaths) -> None:
    """Find out before the model is loaded."""
    for directory in (paths.root, paths.claims, paths.leases, paths.parts):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise JobDirectoryError("the job directory cannot be written", where=str(directory),
                                    hint="is the file system mounted read-only? To let a group help, its owner says "
                                         f"umask 002 before the first start, or later: chmod -R g+w {paths.root}")


def read_manifest(paths: JobPaths) -> Manifest:
    """Read the stored manifest. Not collective."""
    return _parse(paths, paths.manifest.read_bytes())


def _open(paths: JobPaths, values: Manifest, pinned: Mapping[str, Any]) -> bytes:
    paths.create()
    wanted = {"format_version": FORMAT_VERSION, **values}
    if not paths.manifest.exists():
        publish_bytes(paths.manifest, _dump(_with_pins(wanted, pinned)))
    data = paths.manifest.read_bytes()
    stored = _parse(paths, data)
    _compare(paths, wanted, stored, {key for key in pinned if _get(wanted, key) is None})
    if not paths.complete.exists():
        _require_writable(paths)
    return data


def _dump(values: Manifest) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _parse(paths: JobPaths, data: bytes) -> Manifest:
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise JobDirectoryError(f"the manifest is damaged: {error}", where=str(paths.manifest)) from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise JobDirectoryError("not a manifest of hpcinfer", where=str(paths.manifest))
    return manifest


def _get(values: Manifest, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def _with_pins(values: Manifest, pinned: Mapping[str, Any]) -> Manifest:
    result: Manifest = json.loads(json.dumps(values))
    for key, value in pinned.items():
        if _get(result, key) is None:
            *sections, name = key.split(".")
            section = result
            for step in sections:
                section = section.setdefault(step, {})
            section[name] = value
    return result


def _compare(paths: JobPaths, wanted: Manifest, stored: Manifest, open_keys: set[str]) -> None:
    ours, theirs = _flatten(json.loads(json.dumps(wanted))), _flatten(stored)
    compared = {key for key in ours.keys() | theirs.keys() if key.split(".")[0] != INFORMATIVE} - open_keys
    differences = [f"{key}: this job has {_show(ours, key)}, the job directory {_show(theirs, key)}"
                   for key in sorted(compared) if _show(ours, key) != _show(theirs, key)]
    if differences:
        raise ManifestError("the job directory belongs to another job:\n    " + "\n    ".join(differences),
                            expected="the same model, input, options and seed as at the first start",
                            where=str(paths.root),
                            hint="give the same options again, or another --output")


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"


def _flatten(values: Manifest, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
