"""The input file of a job: found, hashed in parallel, decompressed once."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.agree import on_all, on_root
from hpcinfer.errors import ConfigError
from hpcinfer.partition.split import split
from hpcinfer.recovery.digests import BLOCK_BYTES
from hpcinfer.recovery.durable import create, publish, remove_abandoned, temporary_path
from hpcinfer.recovery.layout import JobPaths

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_GZIP_MAGIC = b"\x1f\x8b"


class InputFile(NamedTuple):
    """What the manifest says about the input."""

    path: Path
    size_bytes: int
    digest: str  # SHA-256 over the SHA-256 of each 16 MiB
    is_gzip: bool


def inspect_input(path: Path, group: Collectives) -> InputFile:
    """Hash the input, each rank its share.

    Collective over the group.

    Raises:
        ConfigError: no such file, or an empty one.
    """
    size_bytes, is_gzip = map(int, on_root(group, lambda: _look(path)).split())
    blocks = split(-(-size_bytes // BLOCK_BYTES), group.size)[group.rank]
    digests = group.all_gather_bytes(on_all(group, lambda: _block_digests(path, blocks)))
    return InputFile(path, size_bytes, hashlib.sha256(b"".join(digests)).hexdigest(), bool(is_gzip))


def plain_input(paths: JobPaths, source: InputFile, group: Collectives) -> Path:
    """Return the input itself, or its decompressed copy in the job directory, made at the first start.

    Collective over the group. Call it after the manifest has accepted the input.
    """
    if not source.is_gzip:
        return source.path
    return Path(os.fsdecode(on_root(group, lambda: _decompress(paths, source.path))))


def _look(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            magic, size_bytes = file.read(2), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error.strerror}", expected="a file of prompts", where=str(path),
                          hint="check --input") from error
    if size_bytes == 0:
        raise ConfigError("the input is empty", expected="at least one prompt", where=str(path), hint="check --input")
    return f"{size_bytes} {int(magic == _GZIP_MAGIC)}".encode()


def _block_digests(path: Path, blocks: range) -> bytes:
    if not blocks:
        return b""
    digests = []
    with path.open("rb") as file:
        file.seek(blocks.start * BLOCK_BYTES)
        for _ in blocks:
            digests.append(hashlib.sha256(file.read(BLOCK_BYTES)).digest())
    return b"".join(digests)


def _decompress(paths: JobPaths, source: Path) -> bytes:
    target = paths.plain_input
    if not target.exists():
        remove_abandoned(target)
        temporary = temporary_path(target)
        try:
            _gunzip(source, temporary)
            publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    if target.stat().st_size == 0:
        raise ConfigError("the input is empty", expected="at least one prompt", where=str(source))
    return os.fsencode(target)


def _gunzip(source: Path, target: Path) -> None:
    with os.fdopen(create(target), "wb") as plain:
        try:
            with gzip.open(source, "rb") as packed:
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(f"the compressed input is damaged: {error}", expected="a whole gzip file",
                              where=str(source), hint="gzip -t tells; copy the file again") from error
        plain.flush()
        os.fsync(plain.fileno())
