"""A folder belongs to one process at a time: who wants it writes the next claim, which names a lease of its own.

No lock of the file system is needed: on clusters these often do nothing, or hold on one node only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from hpcinfer.recovery.durable import list_names, publish_bytes
from hpcinfer.recovery.leases import Lease, LeaseObserver, read_lease

KEPT = ("claims", "leases")  # folders of what is claimed
_TIMEOUT_S = 60.0  # without a sign of life of a process on another node, after which its claim is free
_LOOK_S = 0.2


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process, as long as the process lives; False if another one does."""
    claims, leases = (folder / name for name in KEPT)
    for each in (claims, leases):
        each.mkdir(parents=True, exist_ok=True)
    with Lease(leases, _TIMEOUT_S) as lease:
        yield _take(claims, leases, lease.name)


def _take(claims: Path, leases: Path, name: str) -> bool:
    """Write the next claim if the last one is free; none is ever removed, so of several takers one has the number."""
    last = max((int(each) for each in list_names(claims)), default=0)
    if last and _is_alive(leases, (claims / str(last)).read_text()):
        return False
    return publish_bytes(claims / str(last + 1), name.encode())


def _is_alive(leases: Path, name: str) -> bool:
    """Watch a lease until it gives a sign of life, or none for too long."""
    observer, first = LeaseObserver(leases, _TIMEOUT_S), _counter(leases / name)
    while observer.is_alive(name):
        if _counter(leases / name) != first:
            return True
        time.sleep(_LOOK_S)
    return False


def _counter(lease: Path) -> bytes:
    try:
        return read_lease(lease)[0]
    except OSError:  # it has ended
        return b""
