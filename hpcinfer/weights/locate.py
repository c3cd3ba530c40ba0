"""From what the user calls the model (a store, a Hugging Face folder, a hub name) to a store on this file system."""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.agree import on_root
from hpcinfer.config import ModelConfig
from hpcinfer.errors import ConfigError, ModelError
from hpcinfer.weights.reader import Store
from hpcinfer.weights.store_format import FORMAT_VERSION, INDEX_FILE

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

log = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FOLDER = "models--"
_EDGE = 1 << 16  # bytes at each end of a large file that its identity is made of
_SMALL = 1 << 22  # bytes up to which a file's whole content is


class Located(NamedTuple):
    """A model that was found."""

    source: str  # Hugging Face folder; empty if the store is there already
    store: str


class Preview(NamedTuple):
    """What a store holds, or will hold, besides weights."""

    config: ModelConfig
    grains: int
    tokenizer_files: dict[str, bytes]


def resolve_model(model: str, cache_dir: str | None, group: "Collectives", fallback_dir: Path | None = None) -> Path:
    """Find the store of a model; a Hugging Face folder is converted once, by the ranks of the group.

    Collective over `group`.

    Args:
        model: path of a store, of a Hugging Face folder or a hub-cache entry, or a hub name that is there locally.
        cache_dir: where stores are kept; None is $HPCINFER_CACHE.
        group: ranks of the job.
        fallback_dir: used when neither names a folder.

    Returns:
        The folder of the store.

    Raises:
        ModelError: no such model, or one that is not supported.
        ConfigError: a conversion is needed, and there is no folder or no room for it.
    """
    return ensure_store(locate_model(model, cache_dir, group, fallback_dir), group)


def locate_model(model: str, cache_dir: str | None, group: "Collectives", fallback_dir: Path | None = None) -> Located:
    """Find a model, and where its store is or will be; converts nothing. See `resolve_model`.

    Collective over `group`.
    """
    found = on_root(group, lambda: json.dumps(_locate(model, cache_dir, fallback_dir)).encode())
    return Located(*json.loads(found))


def preview(located: Located, store: Store | None) -> Preview:
    """Read what a job is checked against, before anything is converted. Not collective.

    Args:
        located: the model.
        store: of it, if it is there already.
    """
    if store is not None:
        return Preview(store.config, store.grains, store.tokenizer_files)
    from hpcinfer.weights.conversion import default_grains
    from hpcinfer.weights.source import Source

    with Source(Path(located.source)) as source:
        return Preview(source.config, default_grains(source.config), source.tokenizer_files)


def ensure_store(located: Located, group: "Collectives") -> Path:
    """Convert a located folder, unless its store is there.

    Collective over `group`.
    """
    if located.source:
        from hpcinfer.weights.conversion import convert

        if group.rank == 0:
            log.info("the store of %s will be %s", located.source, located.store)
        convert(Path(located.source), Path(located.store), group, existing_ok=True)
    return Path(located.store)


def find_model(model: str) -> Path:
    """Find the folder of a model: a store or a Hugging Face folder.

    Not collective.

    Raises:
        ModelError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder_of(path)
    if path.exists():
        raise ModelError(f"{model} is a file", expected="the folder of a store, or of a Hugging Face model")
    if _HUB_NAME.fullmatch(model):
        return _from_hub_cache(model)
    raise ModelError(f"no model at {model}", expected="a store, a Hugging Face folder, or a hub name as org/name")


def _locate(model: str, cache_dir: str | None, fallback_dir: Path | None) -> Located:
    folder = find_model(model)
    if (folder / INDEX_FILE).exists():
        return Located("", str(folder))
    store = _cache_folder(cache_dir, fallback_dir) / f"{_label(folder)}-{source_key(folder)}.store"
    if (store / INDEX_FILE).exists():
        log.info("using the store %s", store)
        return Located("", str(store))
    return Located(str(folder), str(store))


def _cache_folder(cache_dir: str | None, fallback_dir: Path | None) -> Path:
    named = cache_dir or os.environ.get("HPCINFER_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    if fallback_dir is None:
        raise ConfigError(
            "the model is no store, and no folder is named for the one to be made of it",
            expected="--cache-dir or $HPCINFER_CACHE, a folder on the shared file system",
            hint="or convert once: hpcinfer convert MODEL MODEL.store",
        )
    return fallback_dir.absolute()


def source_key(folder: Path) -> str:
    """Identify the content of a Hugging Face folder without reading the weights: 16 hex digits.

    Not collective. Made of the resolved path, and for each file of its name, size, time of change and content: whole
    if it is small, 64 KiB at both ends if not. A changed file changes its time, so a stale store is never taken; a
    needless conversion (a touched file) is the price. Two folders never share a key: the path is part of it.
    """
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, str(folder.resolve())]).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors") and path.is_file():
            status = path.stat()
            key.update(json.dumps([path.name, status.st_size, status.st_mtime_ns]).encode())
            key.update(_sample(path, status.st_size))
    return key.hexdigest()[:16]


def _sample(path: Path, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        if size <= _SMALL:
            return file.readall()
        return os.pread(file.fileno(), _EDGE, 0) + os.pread(file.fileno(), _EDGE, size - _EDGE)


def _label(folder: Path) -> str:
    """Readable part of a store's name: of a hub-cache snapshot the model's name, not the revision's."""
    parts = folder.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith(_HUB_FOLDER):
        return parts[-3][len(_HUB_FOLDER) :]
    return folder.absolute().name or "model"


def _folder_of(path: Path) -> Path:
    if (path / INDEX_FILE).is_file() or (path / "config.json").is_file():
        return path
    if (path / "snapshots").is_dir():
        return _snapshot(path)
    raise ModelError(
        f"{path} holds neither {INDEX_FILE} nor config.json",
        expected="a store, or a Hugging Face folder",
        hint="an interrupted conversion (….tmp-…) is not a store: convert again",
    )


def _snapshot(entry: Path) -> Path:
    """Take the revision that refs/main names, or the only one there is."""
    revisions = sorted(path for path in (entry / "snapshots").iterdir() if (path / "config.json").exists())
    main = entry / "refs" / "main"
    if main.is_file():
        revisions = [path for path in revisions if path.name == main.read_text().strip()] or revisions
    if len(revisions) != 1:
        names = ", ".join(path.name for path in revisions) or "none"
        raise ModelError(
            f"{len(revisions)} complete snapshots: {names}",
            expected="refs/main to name one",
            where=str(entry),
            hint="fetch the model again, or give the path of one snapshot",
        )
    return revisions[0]


def _from_hub_cache(name: str) -> Path:
    roots = _hub_roots()
    for root in roots:
        entry = root / (_HUB_FOLDER + name.replace("/", "--"))
        if entry.is_dir():
            return _snapshot(entry)
    raise ModelError(
        f"no model {name} on this file system",
        expected="a folder, or an entry of the hub cache",
        where=", ".join(str(root) for root in roots),
        hint=f"on a login node: hf download {name} (a gated model: hf auth login first, and accept its licence on its"
        " page), with HF_HOME on the shared file system; then start the job with the same HF_HOME, or give the folder",
    )


def _hub_roots() -> list[Path]:
    """Hub caches, in the order in which Hugging Face's own tools look for one."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_HOME") and os.environ["HF_HOME"] + "/hub"]
    paths = [*(path for path in named if path), f"{cache_home}/huggingface/hub"]
    return [Path(path).expanduser() for path in paths]
