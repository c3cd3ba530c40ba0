"""Leases: a small file per living claimant, with a counter that is rewritten in place every few seconds.

No clock of another node is ever compared: an observer times, on its own clock, how long a counter stands still.
"""

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcinfer.errors import StorageError
from hpcinfer.recovery.durable import close_quietly, list_names, publish_bytes, write_all
from hpcinfer.recovery.patience import GONE, patiently

log = logging.getLogger(__name__)

_COUNTER = "{:020d}\n"
_BEATS_PER_TIMEOUT = 20
_SLOW_S = 1.0  # a look that takes longer was held up


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
        start_time = _start_time(self.pid)
        return start_time != self.start_time and not (start_time is None and _is_hidden(self.pid))


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
        record = json.dumps(asdict(Holder.this_process()))
        publish_bytes(self._path, f"{_COUNTER.format(0)}{record}\n".encode())
        patiently(self._open, self._path, errors=GONE)
        self._thread.start()
        return self

    def beat(self) -> None:
        """Raise the counter. Not collective."""
        self._counter += 1
        try:
            write_all(self._descriptor, _COUNTER.format(self._counter).encode(), 0)
            os.fsync(self._descriptor)
        except OSError:
            self._open()  # a descriptor may be of no use any more after the file system was away
            raise

    def _open(self) -> None:
        """Open the lease by its name; never anew, since whoever has removed it counts us as gone."""
        descriptor, self._descriptor = self._descriptor, os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if descriptor >= 0:
            close_quietly(descriptor)

    def close(self) -> None:
        """End the lease: what it claimed and did not finish is free at once. Not collective."""
        if self._descriptor < 0:
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError):  # it would only be stale later than it could be
            self._path.unlink()
        close_quietly(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> "Lease":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        is_silent = False
        while not self._stop.wait(self.timeout_s / _BEATS_PER_TIMEOUT):
            try:
                patiently(self.beat, self._path, errors=GONE, stop=self._stop)
                is_silent = False
            except (OSError, StorageError) as error:
                if not is_silent:
                    log.warning("no sign of life can be written to %s: %s", self._path, error)
                is_silent = True


class LeaseObserver:
    """Tells living leases from stale ones, by its own clock."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self._directory, self._timeout_s = directory, timeout_s
        self._seen: dict[str, tuple[bytes, float]] = {}  # name -> counter, when it was new to us
        self._blind_s = 0.0  # in which nobody could look, and perhaps nobody could give a sign of life

    def names(self) -> list[str]:
        """List leases that have not ended, stale ones too. Not collective."""
        return sorted(list_names(self._directory))

    def is_alive(self, name: str) -> bool:
        """Look at a lease once; the empty name is nobody's. Not collective.

        Returns:
            False if it has ended, if its process was on this host and is gone, or if its counter did not change
            for the timeout since this observer first saw it so.
        """
        found = self._look(name) if name else None
        if found is None:
            return False
        counter, holder = found
        now = time.monotonic() - self._blind_s
        last_counter, since = self._seen.get(name, (b"", now))
        if counter != last_counter:
            self._seen[name] = counter, now
        elif now - since > self._timeout_s:
            return False
        return holder is None or not holder.is_gone()

    def _look(self, name: str) -> tuple[bytes, Holder | None] | None:
        start = time.monotonic()
        found = patiently(lambda: self._read(name), self._directory / name, errors=GONE)
        took_s = time.monotonic() - start
        self._blind_s += took_s if took_s > _SLOW_S else 0.0
        return found

    def _read(self, name: str) -> tuple[bytes, Holder | None] | None:
        """Read a lease, None if it has ended; where the whole directory is gone, no lease has."""
        try:
            return read_lease(self._directory / name)
        except FileNotFoundError:
            os.stat(self._directory)
            return None


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


def _is_hidden(pid: int) -> bool:
    """Whether there is a process that we may not look at: another user's, where /proc is mounted with hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


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
