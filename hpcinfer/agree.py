"""How the ranks of a group fail together: one message, the same exit code everywhere, nobody left waiting.

Works on any group with the `Collectives` protocol (`hpcinfer.comm.protocol`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from hpcinfer.errors import EXIT_FAILED, ConfigError, PeerError

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

T = TypeVar("T")


def settle(group: Collectives, error: Exception | None) -> None:
    """Go on if no rank has an error; else raise it on the lowest such rank and `PeerError` on the others.

    Collective over `group`.

    Raises:
        Exception: this rank's own error, if it is the lowest rank that has one.
        PeerError: on all other ranks, with the same exit code.
    """
    code = getattr(error, "exit_code", EXIT_FAILED)
    verdicts = group.all_gather_bytes(f"{code} {error}".encode(errors="backslashreplace") if error else b"")
    first = next((rank for rank, verdict in enumerate(verdicts) if verdict), None)
    if first is None:
        return
    if error is not None and group.rank == first:
        raise error
    code_text, _, message = verdicts[first].decode().partition(" ")
    peer_error = PeerError(message, where=f"rank {first}/{group.size}")
    peer_error.exit_code = int(code_text)
    raise peer_error


def on_all(group: Collectives, work: Callable[[], T]) -> T:
    """Do local work on every rank; if it fails on any, it fails on all.

    Collective over `group`; `work` itself must not be.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    settle(group, error)
    return result


def on_root(group: Collectives, work: Callable[[], bytes]) -> bytes:
    """Do local work on rank 0 and give its bytes to every rank; if it fails, it fails on all.

    Collective over `group`; `work` itself must not be.
    """
    return group.broadcast_bytes(on_all(group, work if group.rank == 0 else bytes))


def same_everywhere(group: Collectives, value: str, what: str) -> None:
    """Check that all ranks hold the same text.

    Collective over `group`.

    Raises:
        ConfigError: on the lowest rank that differs from rank 0; PeerError on the others.
    """
    values = [item.decode() for item in group.all_gather_bytes(value.encode())]
    error = None
    if value != values[0]:
        error = ConfigError(
            f"{what} differs: {value}",
            expected=f"rank 0's: {values[0]}",
            where=where_am_i(group),
            hint="start ranks with the same software on nodes of one type",
        )
    settle(group, error)


def where_am_i(group: Collectives) -> str:
    """Say rank, size and host, as every message that leaves a rank begins."""
    return f"rank {group.rank}/{group.size} on {socket.gethostname()}"
