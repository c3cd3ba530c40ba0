"""Leases: a small file per living claimant, with a counter that is rewritten in place every few seconds.

No clock of another node is ever compared: an observer times, on its own clock, how long a counter stands still.
"""

import errno
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcinfer.recovery.durable import create, list_names, publish, temporary_path, write_all

log = logging.getLogger(__name__)

_COUNTER = "{:020d}\n"
_BEATS_PER_TIMEOUT = 20


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: enough for an observer on the same host to see that the process is gone."""

    host: str
    pid: int
    start_time: int  # clock ticks after boot
    boot_id: str
    pid_namespace: int
    slurm_job_id: str = ""

    @staticmethod
    def this_process() -> "Holder":
        """Describe the calling process. Not collective."""
        pid = os.getpid()
        return Holder(socket.gethostname(), pid, _start_time(pid) or 0, _boot_id(), _pid_namespace(),
                      os.environ.get("SLURM_JOB_ID", ""))

    def is_gone(self) -> bool:
        """Whether the process has surely ended: it ran here, and it does not any more. Not collective."""
        if not self.boot_id or (self.boot_id, self.pid_namespace) != (_boot_id(), _pid_namespace()):
            return False
        return _start_time(self.pid) != self.start_time


def incarnation_name() -> str:
    """Make a name that no other lease or part has: host, pid, random digits. Not collective."""
    host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname().split(".")[0])
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


class Lease:
    """This process's own sign of life. Use as a context manager, or call `start` and `close`."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self.name = incarnation_name()
        self.timeout_s = timeout_s
        self._path = directory / self.name
        self._counter = 0
        self._descriptor = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> "Lease":
        """Write the lease and keep it alive from a thread. Not collective."""
        temporary = temporary_path(self._path)
        self._descriptor = create(temporary)
        record = json.dumps(asdict(Holder.this_process()))
        write_all(self._descriptor, f"{_COUNTER.format(0)}{record}\n".encode())
        os.fsync(self._descriptor)
        publish(temporary, self._path)
        self._thread.start()
        return self

    def beat(self) -> None:
        """Raise the counter. Not collective."""
        self._counter += 1
        write_all(self._descriptor, _COUNTER.format(self._counter).encode(), 0)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """End the lease: what it claimed and did not finish is free at once. Not collective."""
        if self._descriptor < 0:
            return
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> "Lease":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stop.wait(self.timeout_s / _BEATS_PER_TIMEOUT):
            try:
                self.beat()
            except OSError as error:
                log.warning("no sign of life could be written to %s: %s", self._path, error)


class LeaseObserver:
    """Tells living leases from stale ones, by its own clock."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self._directory, self._timeout_s = directory, timeout_s
        self._seen: dict[str, tuple[bytes, float]] = {}  # name -> counter, when it was new to us

    def names(self) -> list[str]:
        """List leases that have not ended, stale ones too. Not collective."""
        return sorted(list_names(self._directory))

    def is_alive(self, name: str) -> bool:
        """Look at a lease once; the empty name is nobody's. Not collective.

        Returns:
            False if it has ended, if its process was on this host and is gone, or if its counter did not change
            for the timeout since this observer first saw it so.
        """
        if not name:
            return False
        try:
            counter, holder = read_lease(self._directory / name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise
        now = time.monotonic()
        last_counter, since = self._seen.get(name, (b"", now))
        if counter != last_counter:
            self._seen[name] = counter, now
        elif now - since > self._timeout_s:
            return False
        return holder is None or not holder.is_gone()


def read_lease(path: Path) -> tuple[bytes, Holder | None]:
    """Read counter and holder (None if it cannot be read). Not collective."""
    counter, _, record = path.read_bytes().partition(b"\n")
    try:
        return counter, Holder(**json.loads(record))
    except (ValueError, TypeError):
        return counter, None


def _start_time(pid: int) -> int | None:
    """Start of a process, None if there is none any more (one that nobody has buried yet counts as gone)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
