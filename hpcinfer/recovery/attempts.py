"""Attempts: each `--retry-errors` puts the rows that ended in errors back to work, under the next number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer.agree import on_root
from hpcinfer.errors import ConfigError
from hpcinfer.recovery.durable import list_names, publish_bytes
from hpcinfer.recovery.index import Index
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.sidecar import JournalReader
from hpcinfer.recovery.states import RowStates

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

MAX_ATTEMPT = 255  # one byte in the sidecar


def current_attempt(paths: JobPaths) -> int:
    """Read the number of the latest attempt, 0 for the first. Not collective."""
    return max((int(name) for name in list_names(paths.attempts) if name.isdigit()), default=0)


def open_attempt(paths: JobPaths, index: Index, group: Collectives, *, retry_errors: bool) -> int:
    """Join the current attempt, or open the next one for the rows that ended in errors.

    Collective over the group. A retry that was interrupted is continued, not started over: the next attempt is
    opened only if the current one is the first, or has come to its end.
    """
    return int(on_root(group, lambda: str(_open(paths, index, retry_errors)).encode()))


def _open(paths: JobPaths, index: Index, retry_errors: bool) -> int:
    attempt = current_attempt(paths)
    if not retry_errors:
        return attempt
    states = RowStates(index.num_rows, attempt)
    states.read_all(JournalReader(paths))
    if states.num_failed == 0 or (attempt > 0 and states.num_unfinished > 0):
        return attempt
    if attempt == MAX_ATTEMPT:
        raise ConfigError(f"{attempt} retries of the same errors", expected=f"at most {MAX_ATTEMPT}")
    publish_bytes(paths.attempts / str(attempt + 1), b"")
    return attempt + 1
