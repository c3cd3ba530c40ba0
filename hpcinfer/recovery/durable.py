"""Files that appear whole or not at all: written under a temporary name, then linked or renamed."""

import errno
import glob
import os
import secrets
from pathlib import Path

from hpcinfer.errors import JobDirectoryError

_SUFFIX = ".tmp"
_ABANDONED_S = 3600.0  # a temporary file that nobody wrote to for so long belongs to a job that was killed


def temporary_path(path: Path) -> Path:
    """Make an unused hidden name in the directory of `path`; hard links need not work across directories."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_SUFFIX}")


def create(path: Path) -> int:
    """Open a new file for reading and writing, with the permissions that the umask leaves."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int | None = None) -> None:
    """Write every byte, at `offset` or where the file stands."""
    view = memoryview(data)
    while view:
        count = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count


def write_new(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file that must not exist yet; with `sync` it is durable on return, its name not yet.

    Nothing is left of a file that cannot be written.
    """
    descriptor = create(path)
    try:
        write_all(descriptor, data)
        if sync:
            os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
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
        os.link(temporary, path)
        is_ours = True
    except FileExistsError:
        # NFS may repeat a link whose answer was lost: two links mean that the first one had worked.
        is_ours = temporary.stat().st_nlink == 2
    except OSError as error:
        raise JobDirectoryError(f"cannot link: {error}", expected="a file system with hard links",
                                where=str(path), hint="put the output on another file system") from error
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        sync_directory(path.parent)
    return is_ours


def publish_bytes(path: Path, data: bytes, *, sync: bool = True) -> bool:
    """Write a file whole unless it exists; returns whether it is ours."""
    temporary = temporary_path(path)
    write_new(temporary, data, sync=sync)
    return publish(temporary, path, sync=sync)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, in the place of whatever has its name."""
    temporary = temporary_path(path)
    write_new(temporary, data)
    os.replace(temporary, path)
    sync_directory(path.parent)


def remove_abandoned(path: Path) -> None:
    """Delete temporary files of `path` that killed jobs left; only times that the file system wrote are compared."""
    probe = temporary_path(path)
    write_new(probe, b"", sync=False)
    now = probe.stat().st_mtime
    probe.unlink()
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        _remove_old(leftover, now)


def list_names(directory: Path) -> list[str]:
    """List what has its name in a directory; temporary files that killed jobs left there are deleted.

    They are old if the directory has changed for long after them: again, both times are the file system's.
    """
    names = os.listdir(directory)
    leftovers = [name for name in names if name.startswith(".") and name.endswith(_SUFFIX)]
    now = directory.stat().st_mtime if leftovers else 0.0
    for name in leftovers:
        _remove_old(directory / name, now)
    return [name for name in names if not name.startswith(".")]


def _remove_old(leftover: Path, now: float) -> None:
    try:
        if now - leftover.stat().st_mtime > _ABANDONED_S:
            leftover.unlink()
    except FileNotFoundError:
        pass  # another job was faster, or it has its name now
