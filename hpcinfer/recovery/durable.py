"""Files that appear whole or not at all: written under a temporary name, then linked or renamed."""

import errno
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery.patience import GONE, patiently

_SUFFIX = ".tmp"
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_ABANDONED_S = 3600.0  # a temporary file that nobody wrote to for so long belongs to a job that was killed


def temporary_path(path: Path) -> Path:
    """Make an unused hidden name in the directory of `path`; hard links need not work across directories."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_SUFFIX}")


def create(path: Path) -> int:
    """Open a new file for reading and writing, with the permissions that the umask leaves."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def close_quietly(descriptor: int) -> None:
    """Close a file; what counts was synced."""
    with suppress(OSError):
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int | None = None) -> None:
    """Write every byte, at `offset` or where the file stands."""
    view = memoryview(data)
    while view:
        count = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file failed: an error of a descriptor does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def write_new(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file that must not exist yet; with `sync` it is durable on return, its name not yet.

    Nothing is left of a file that cannot be written.
    """
    descriptor = create(path)
    try:
        with naming(path):
            write_all(descriptor, data)
            if sync:
                os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable that somebody else has written and closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a directory say so
            raise
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path, *, sync: bool = True) -> bool:
    """Give a finished file its name unless the name is taken; the temporary name is gone either way.

    Returns:
        Whether it is our file that now has the name.
    """
    try:
        is_ours = patiently(lambda: _link(temporary, path), path, errors=GONE)
    finally:
        with suppress(OSError):  # what is left is removed by later jobs
            temporary.unlink()
    if sync:
        patiently(lambda: sync_directory(path.parent), path.parent, errors=GONE)
    return is_ours


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # The answer to a link that has worked may be lost, by NFS or before we tried again.
        return os.path.samestat(os.stat(temporary), os.stat(path))
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise JobDirectoryError(f"cannot link: {error}", expected="a file system with hard links",
                                where=str(path), hint="put the output on another file system") from error
    return True


def publish_bytes(path: Path, data: bytes, *, sync: bool = True) -> bool:
    """Write a file whole unless it exists; returns whether it is ours."""
    return publish(_write_temporary(path, data, sync=sync), path, sync=sync)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, in the place of whatever has its name."""
    rename(_write_temporary(path, data, sync=True), path)


def rename(temporary: Path, path: Path) -> None:
    """Give a finished file its name, in the place of whatever has it; durable on return."""
    status = patiently(lambda: os.stat(temporary), temporary, errors=GONE)
    patiently(lambda: _rename(temporary, path, status), path, errors=GONE)
    patiently(lambda: sync_directory(path.parent), path.parent, errors=GONE)


def _rename(temporary: Path, path: Path, status: os.stat_result) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        if not os.path.samestat(status, os.stat(path)):  # else it had worked, and the answer was lost
            raise


def _write_temporary(path: Path, data: bytes, *, sync: bool) -> Path:
    """Write a new file each time: what a failed one holds nobody knows."""

    def write() -> Path:
        temporary = temporary_path(path)
        write_new(temporary, data, sync=sync)
        return temporary

    return patiently(write, path, errors=GONE)


def make_directory(path: Path) -> None:
    """Make a directory that may be there already, in one that is."""
    patiently(lambda: path.mkdir(exist_ok=True), path, errors=GONE)


def remove_abandoned(path: Path) -> None:
    """Delete temporary files of `path` that killed jobs left; only times that the file system wrote are compared."""
    probe = temporary_path(path)
    write_new(probe, b"", sync=False)
    try:
        now = probe.stat().st_mtime
    finally:
        with suppress(OSError):
            probe.unlink()
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        _remove_old(leftover, now)


def list_names(directory: Path) -> list[str]:
    """List what has its name in a directory; temporary files that killed jobs left there are deleted.

    They are old if the directory has changed for long after them: again, both times are the file system's.
    """
    return patiently(lambda: _list_names(directory), directory, errors=GONE)


def _list_names(directory: Path) -> list[str]:
    names = os.listdir(directory)
    leftovers = [name for name in names if name.startswith(".") and name.endswith(_SUFFIX)]
    now = directory.stat().st_mtime if leftovers else 0.0
    for name in leftovers:
        _remove_old(directory / name, now)
    return [name for name in names if not name.startswith(".")]


def _remove_old(leftover: Path, now: float) -> None:
    with suppress(OSError):  # another job was faster, it has its name now, or it is not ours to remove
        if now - leftover.stat().st_mtime > _ABANDONED_S:
            leftover.unlink()
