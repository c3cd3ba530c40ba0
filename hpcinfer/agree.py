"""How the ranks of a group fail together: one message, the same exit code everywhere, nobody left waiting.

Works on any group with the `Collectives` protocol (`hpcinfer.comm.protocol`).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from hpcinfer.errors import EXIT_FAILED, ConfigError, PeerError

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

T = TypeVar("T")


def settle(group: Collectives, error: Exception | None) -> None:
    """Go on if no rank has an error; else raise it on the lowest such rank and `PeerError` on the others.

    What a rank has only heard of (`PeerError`) counts where no rank has an error of its own.

    Collective over `group`.

    Raises:
        Exception: this rank's own error, if it is the lowest rank that has one.
        PeerError: on all other ranks, with the same exit code.
    """
    code, is_own = getattr(error, "exit_code", EXIT_FAILED), not isinstance(error, PeerError)
    verdicts = group.all_gather_bytes(f"{is_own:d} {code} {error}".encode(errors="backslashreplace") if error else b"")
    failing = [rank for rank, verdict in enumerate(verdicts) if verdict]
    if not failing:
        return
    first = min(failing, key=lambda rank: (verdicts[rank][:1] != b"1", rank))
    if error is not None and group.rank == first:
        agreed: Exception = error
    else:
        _, code_text, message = verdicts[first].decode().split(" ", 2)
        agreed = PeerError(message, where=f"rank {first}/{group.size}")
        agreed.exit_code = int(code_text)
    agreed.__dict__["is_agreed"] = True
    raise agreed


def is_agreed(error: BaseException | None) -> bool:
    """Whether an error, or the one that it was made of, is known to have ended all ranks of its group."""
    return error is not None and ("is_agreed" in error.__dict__ or is_agreed(error.__cause__))


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


def same_everywhere(group: Collectives, values: Mapping[str, Any], what: str) -> None:
    """Check that all ranks hold the same values.

    Collective over `group`.

    Raises:
        ConfigError: on the lowest rank that differs from rank 0, naming the keys; PeerError on the others.
    """
    own = json.dumps(values, sort_keys=True)
    first = json.loads(group.all_gather_bytes(own.encode())[0])
    mine = json.loads(own)
    keys = [key for key in sorted({*first, *mine}) if first.get(key) != mine.get(key)]
    error = None
    if keys:
        error = ConfigError(
            f"{what} differ between ranks: " + ", ".join(f"{key} is {mine.get(key)!r}" for key in keys),
            expected="as on rank 0: " + ", ".join(f"{key} is {first.get(key)!r}" for key in keys),
            where=where_am_i(group),
            hint="start all ranks with one command line, and the same software on nodes of one type",
        )
    settle(group, error)


def where_am_i(group: Collectives) -> str:
    """Say rank, size and host, as every message that leaves a rank begins."""
    return f"rank {group.rank}/{group.size} on {socket.gethostname()}"
