"""File systems under the paths of a job: type, room, permissions and quota."""

import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

ANSWER_LIMIT_S = 4.0  # for a file system; one that is gone lets its callers wait forever
_QUOTA_LIMIT_S = 2.0


class Mount(NamedTuple):
    """The file system that holds a path."""

    point: str
    kind: str  # as ext4, nfs4, lustre
    is_read_only: bool = False


class Place(NamedTuple):
    """A path that a job uses."""

    use: str  # model, output, cache...
    path: str
    mount: Mount
    free_bytes: int = -1  # -1 where the file system does not say
    free_files: int = -1
    problem: str = ""  # why it cannot be used
    identity: str = ""  # differs where the content does
    quota: str = ""  # what the quota tools say, if a limit is exceeded
    needed_bytes: int = 0  # that a job will write there, as far as it is known


def answer_within(seconds: float, work: Callable[[], T]) -> T:
    """Do work in a thread, so that a file system that hangs holds up only that thread.

    Raises:
        TimeoutError: no answer in time; the thread stays behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def look_at(use: str, path: Path, *, needs_write: bool = False) -> Place:
    """Describe the file system under a path; the path itself need not exist yet."""
    mount = mount_of(path)
    try:
        return answer_within(ANSWER_LIMIT_S, lambda: _describe(use, path, mount, needs_write))
    except OSError as error:
        return Place(use, str(path), mount, problem=error.strerror or str(error))


def mount_of(path: Path, table: str | None = None) -> Mount:
    """Find the mount of a path in a table as /proc/self/mountinfo, this process's own if None."""
    if table is None:
        try:
            table = Path("/proc/self/mountinfo").read_text(errors="replace")
        except OSError:
            return Mount("/", "unknown")
    with contextlib.suppress(OSError, RuntimeError, TimeoutError):
        path = answer_within(ANSWER_LIMIT_S, path.resolve)
    best = Mount("", "unknown")
    for line in table.splitlines():
        fields, _, more = line.partition(" - ")
        before, after = fields.split(), more.split()
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before[4])
        if path.is_relative_to(point) and len(point) >= len(best.point):  # of two at one point, the later is on top
            best = Mount(point, after[0], "ro" in before[5].split(",") or "ro" in after[-1].split(","))
    return best


def _describe(use: str, path: Path, mount: Mount, needs_write: bool) -> Place:
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    room = os.statvfs(existing)
    mode = os.W_OK | os.X_OK if needs_write else os.R_OK
    problem = "" if os.access(existing, mode) else "no permission"
    files = room.f_favail if room.f_files else -1
    return Place(use, str(path), mount, room.f_bavail * room.f_frsize, files, problem, quota=_quota(existing, mount))


def _quota(path: Path, mount: Mount) -> str:
    """What the tools say when a limit is exceeded; "" if none is, or none can tell."""
    if mount.kind == "lustre":
        text = _ask("lfs", "quota", "-q", "-u", str(os.getuid()), str(path))
        return "a limit of lfs quota is exceeded" if "*" in text else ""
    text = _ask("quota", "-q")
    return next((line.strip() for line in text.splitlines() if line.strip().endswith(mount.point)), "")


def _ask(*argv: str) -> str:
    if not shutil.which(argv[0]):
        return ""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=_QUOTA_LIMIT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
