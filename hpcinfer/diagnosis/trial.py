"""Does the directory of the output do what the journal needs? Tried with small files, of which nothing is left."""

import contextlib
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hpcinfer.diagnosis.places import ANSWER_LIMIT_S, answer_within

PREFIX = ".hpcinfer-doctor-"  # of the folders that are made and removed


class Trial(NamedTuple):
    """What a directory did with files of our own."""

    problems: dict[str, str]  # by operation
    sync_s: float = 0.0  # of a small durable write
    clock_offset_s: float = 0.0  # of the file server against this node, as a new file shows it


def try_out(parent: Path) -> Trial:
    """Do with small files in `parent` what a job does."""
    try:
        return answer_within(ANSWER_LIMIT_S, lambda: _try_out(parent / f"{PREFIX}{secrets.token_hex(6)}"))
    except OSError as error:
        return Trial({"write": error.strerror or str(error)})


def _try_out(folder: Path) -> Trial:
    folder.mkdir()
    try:
        file = folder / "file"
        file.write_bytes(b"x" * 4096)
        offset_s = file.stat().st_mtime - time.time()
        failures = {name: _failure(operation, file) for name, operation in _OPERATIONS.items()}
        start = time.monotonic()
        _failure(_sync, file)
        return Trial({name: text for name, text in failures.items() if text}, time.monotonic() - start, offset_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _failure(operation: Callable[[Path], None], file: Path) -> str:
    try:
        operation(file)
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def _append(file: Path) -> None:
    size = file.stat().st_size
    with open(file, "ab") as stream:
        stream.write(b"y")
    _require(file.stat().st_size == size + 1, "the file did not grow")


def _link(file: Path) -> None:
    other = file.with_name("link")
    os.link(file, other)
    _require(file.stat().st_nlink == 2, "a linked file does not count its links")
    with contextlib.suppress(FileExistsError):
        os.link(file, other)
        _require(False, "a name can be linked twice")


def _exclusive(file: Path) -> None:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        _require(False, "it opens a file that is there")


def _sync(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.write(b"z")
        stream.flush()
        os.fsync(stream.fileno())


def _map(file: Path) -> None:
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _require(mapped[1:2] == b"x", "it shows other bytes")


def _rename(file: Path) -> None:
    new = file.with_name("new")
    new.write_bytes(b"new")
    os.replace(new, file.with_name("renamed"))
    _require(not new.exists(), "the old name stays")


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


_OPERATIONS: dict[str, Callable[[Path], None]] = {
    "append": _append, "hard link": _link, "O_EXCL": _exclusive, "fsync": _sync, "mmap": _map, "rename": _rename,
}  # fmt: skip
