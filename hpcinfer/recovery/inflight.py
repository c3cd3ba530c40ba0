"""Rows in flight: what a replica computes right now, and why a rank of it ends, in files that outlive the processes.

What they mean once the replica is dead is in `hpcinfer.recovery.deaths`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.agree import on_root
from hpcinfer.errors import HpcInferError
from hpcinfer.recovery.durable import create, write_all
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Holder, incarnation_name

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

log = logging.getLogger(__name__)

STEP_VARIABLE = "HPCINFER_STEP"  # a supervisor names its steps with it, so that it finds what they leave
HANG = "hang"  # how a note of a rank that did not come back begins

_HEADER_BYTES = 1024
_SLOT = np.dtype("<i8")  # row + 1; 0 is free
_NOT_OURS = (HpcInferError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit)


def start_name(world: Collectives) -> str:
    """Agree on a name for this start of the job: the supervisor's, or a new one. Collective over the world."""
    return on_root(world, lambda: (os.environ.get(STEP_VARIABLE) or incarnation_name()).encode()).decode()


def replica_name(start: str, replica: str) -> str:
    """Name what a replica leaves; `replica` has no dot. Not collective."""
    return f"{start}.{replica}"


class InFlight:
    """The rows that a replica has in its engine; kept by its leader. Use as a context manager.

    The file is rewritten in place, eight bytes at a time, and never synced: it need not survive the node.
    """

    def __init__(self, paths: JobPaths, name: str, *, part: str = "", attempt: int = 0) -> None:
        """Create the file.

        Args:
            paths: of the job.
            name: of the replica, see `replica_name`; new for each start.
            part: of the journal, which the leader writes.
            attempt: of the job, to which the rows belong.
        """
        paths.inflight.mkdir(exist_ok=True)
        self._paths, self._name = paths, name
        record = {"holder": asdict(Holder.this_process()), "part": part, "attempt": attempt}
        self._descriptor = create(paths.inflight_rows(name))
        write_all(self._descriptor, json.dumps(record).encode().ljust(_HEADER_BYTES))
        self._slots: dict[int, int] = {}  # row -> slot
        self._free: list[int] = []
        self._table: dict[int, int] = {}  # slot -> what is in it; slots are taken in ascending order
        self._is_behind = False  # what the file says is old

    def opened(self, row: int) -> None:
        """Note that the engine has got a row, if that is new. Not collective."""
        if row in self._slots:
            return
        slot = self._free.pop() if self._free else len(self._slots)
        self._slots[row] = slot
        self._write(slot, row + 1)

    def closed(self, row: int) -> None:
        """Note that a row has left the engine. Not collective."""
        if row not in self._slots:
            return
        slot = self._slots.pop(row)
        self._free.append(slot)
        self._write(slot, 0)

    def close(self) -> None:
        """End well: nothing is left of the files. Not collective."""
        self.leave()
        remove(self._paths, self._name)

    def leave(self) -> None:
        """End, and leave the files to whoever records the death. Not collective."""
        os.close(self._descriptor)

    def _write(self, slot: int, value: int) -> None:
        self._table[slot] = value
        first, values = (0, list(self._table.values())) if self._is_behind else (slot, [value])
        try:
            write_all(self._descriptor, np.array(values, _SLOT).tobytes(), _HEADER_BYTES + first * _SLOT.itemsize)
            self._is_behind = False
        except OSError as error:  # the rows themselves matter more
            if not self._is_behind:
                log.warning("rows in flight cannot be noted in %s: %s", self._paths.inflight, error)
            self._is_behind = True

    def __enter__(self) -> InFlight:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.leave()


class CrashFile:
    """Takes down why a rank ends: the traceback of a fatal signal, or of an exception of its own. On every rank.

    A rank that was killed from outside leaves nothing in it. Use as a context manager, around the replica's work.
    """

    def __init__(self, paths: JobPaths, name: str) -> None:
        """Open the file of a replica, the same for all its ranks; fatal signals go there from now on."""
        self._paths, self._descriptor = paths, _open_crash(paths, name)
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(file=self._descriptor)

    def note(self, text: str) -> None:
        """Take down a reason. Not collective."""
        write_all(self._descriptor, text.encode(errors="backslashreplace"))

    def move(self, name: str) -> None:
        """Go on in the file of another replica, where survivors form one. Not collective."""
        old, self._descriptor = self._descriptor, _open_crash(self._paths, name)
        faulthandler.enable(file=self._descriptor)
        os.close(old)

    def close(self, error: BaseException | None = None) -> None:
        """End; an error that may be due to the rows is taken down. Not collective."""
        if error is not None and is_own_fault(error):
            self.note("".join(traceback.format_exception(error)))
        faulthandler.disable()
        if self._was_enabled:
            faulthandler.enable(file=2)
        os.close(self._descriptor)

    def __enter__(self) -> CrashFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        self.close(error)


def _open_crash(paths: JobPaths, name: str) -> int:
    paths.inflight.mkdir(exist_ok=True)
    return os.open(paths.inflight_crash(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def is_own_fault(error: BaseException) -> bool:
    """Whether an exception may be due to the rows: not one of the storage, of the user, or of a peer's death."""
    return not isinstance(error, _NOT_OURS) and type(error).__module__.partition(".")[0] != "mpi4py"


class Left(NamedTuple):
    """What a replica that did not end well has left, or what one that works has written so far."""

    name: str
    holder: Holder  # the leader's process
    part: str
    attempt: int
    rows: tuple[int, ...]  # ascending
    crash: str  # the first lines of the crash file; empty if there is nothing in it


def read_left(paths: JobPaths, name: str) -> Left | None:
    """Read what a replica has left; None if there is nothing, or nothing whole. Not collective."""
    try:
        data = paths.inflight_rows(name).read_bytes()
        slots = np.frombuffer(data[_HEADER_BYTES:], _SLOT, max(len(data) - _HEADER_BYTES, 0) // _SLOT.itemsize)
        values = json.loads(data[:_HEADER_BYTES])
        holder, part, attempt = Holder(**values["holder"]), str(values["part"]), int(values["attempt"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    rows = np.unique(slots[slots > 0]) - 1
    return Left(name, holder, part, attempt, tuple(rows.tolist()), _read_crash(paths, name))


def list_left(paths: JobPaths, start: str = "") -> list[str]:
    """List replicas that have files here, those that work too; with `start` only its own. Not collective."""
    suffix = paths.inflight_rows("").name
    try:
        names = os.listdir(paths.inflight)
    except FileNotFoundError:
        return []
    found = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(name for name in found if not start or name.rpartition(".")[0] == start)


def remove(paths: JobPaths, name: str) -> None:
    """Remove the files of a replica. Not collective."""
    paths.inflight_crash(name).unlink(missing_ok=True)
    paths.inflight_rows(name).unlink(missing_ok=True)


def _read_crash(paths: JobPaths, name: str) -> str:
    try:
        with paths.inflight_crash(name).open("rb") as file:
            return file.read(4096).decode(errors="replace")
    except FileNotFoundError:
        return ""
