"""Loading the compiled kernels: instruction set, how threads wait, and which CPUs they take."""

import importlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpcinfer.errors import ConfigError

_SIMD_VARIABLE = "HPCINFER_SIMD"
_BINDING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")  # who sets one has chosen the CPUs
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

_SPINS = "2000"  # about 20 microseconds

logger = logging.getLogger(__name__)


class Library(NamedTuple):
    """The compiled kernels as cffi shows them."""

    ffi: Any
    lib: Any
    workers: tuple[int, ...] = ()  # CPUs of worker threads; none if nothing is bound

    def pointer(self, kind: str, array: np.ndarray | None) -> Any:
        """Point to the memory of a contiguous array, which must outlive the pointer; NULL for none."""
        return self.ffi.NULL if array is None else self.ffi.from_buffer(kind, array)

    def kind(self, dtype: str) -> int:
        """Number of an element type."""
        return int(getattr(self.lib, f"HPC_{dtype.upper()}"))

    def owned(self, pointer: Any, free: Any) -> Any:
        """Take what the library has allocated; it is freed with the last reference.

        Raises:
            MemoryError: there was not enough.
        """
        if pointer == self.ffi.NULL:
            raise MemoryError("the native kernels: not enough memory")
        return self.ffi.gc(pointer, free)

    def bind_workers(self) -> None:
        """Bind the worker threads of the calling thread: OpenMP has a team for each thread that computes."""
        if self.workers:
            cpus = self.ffi.new("int64_t[]", [0, *self.workers])
            failures = self.lib.hpc_pin(1 + len(self.workers), cpus)
            logger.debug("worker threads on CPUs %s, %d could not be bound", self.workers, failures)


class Binding(NamedTuple):
    """Where the threads of a rank run: the worker threads each on one CPU, the caller where it disturbs nobody."""

    caller: frozenset[int]
    workers: tuple[int, ...]


def load(threads: int = 1, local_rank: int | None = 0, local_size: int = 1) -> Library | None:
    """Load the kernels and bind this rank's threads to CPUs; None where the extension was not built or does not load.

    Args:
        threads: of this rank, as of each rank of the node.
        local_rank: None if not known, so that threads stay where the system puts them.
        local_size: ranks on the node.

    Raises:
        ConfigError: $HPCINFER_SIMD asks for an instruction set that is not there.
    """
    cores = cores_of(available_cpus())
    _limit_spinning(is_crowded(cores, os.cpu_count() or 1, local_size, threads))
    try:
        module = importlib.import_module("._native", __package__)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        logger.warning("the native kernels are there, but cannot be loaded: %s", error)
        return None
    library = Library(module.ffi, module.lib)
    _choose_instructions(library, os.environ.get(_SIMD_VARIABLE, ""))
    if local_rank is not None and not any(name in os.environ for name in _BINDING_VARIABLES):
        return _bind(library, choose_cpus(cores, os.cpu_count() or 1, local_rank, local_size, threads))
    return library


def instruction_sets(library: Library) -> list[str]:
    """Those that this build and this CPU have, best first."""
    return str(library.ffi.string(library.lib.hpc_isas()).decode()).split()


def _choose_instructions(library: Library, name: str) -> None:
    possible = instruction_sets(library)
    if not library.lib.hpc_use((name or possible[0]).encode()):
        expected = f"one of {', '.join(possible)}"
        raise ConfigError(f"${_SIMD_VARIABLE} is {name!r}", expected=expected, where="this CPU and this build")


def available_cpus() -> set[int]:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cores_of(cpus: set[int]) -> list[tuple[int, ...]]:
    """Group CPUs by physical core, ascending; each is a core of its own where the system does not tell."""
    return sorted({tuple(sorted((_siblings(cpu) & cpus) | {cpu})) for cpu in cpus})


def _siblings(cpu: int) -> set[int]:
    try:
        return parse_cpu_list(Path(_SIBLINGS.format(cpu)).read_text())
    except (OSError, ValueError):
        return set()


def parse_cpu_list(text: str) -> set[int]:
    """CPUs of a list as Linux writes it: 0-2,8."""
    bounds = (part.partition("-") for part in text.split(","))
    return {cpu for first, _, last in bounds for cpu in range(int(first), int(last or first) + 1)}


def is_crowded(cores: Sequence[tuple[int, ...]], node_cpus: int, local_size: int, threads: int) -> bool:
    """Whether there are more threads than CPUs, so that one that waits should sleep.

    Args:
        cores: CPUs that this process may use, by physical core.
        node_cpus: CPUs of the node.
        local_size: ranks on the node.
        threads: of each rank.
    """
    num_cpus = sum(map(len, cores))
    is_ours = num_cpus < node_cpus  # the launcher gave us a part of the node, perhaps to us alone
    return threads * (1 if is_ours and threads > 1 else local_size) > num_cpus


def choose_cpus(
    cores: Sequence[tuple[int, ...]], node_cpus: int, local_rank: int, local_size: int, threads: int
) -> Binding | None:
    """Choose the CPUs of a rank's threads, physical cores before their second threads; None to bind nothing.

    Where all ranks of the node fit into the CPUs that we see, each takes its own slice: that is right whether the
    others see the same CPUs or others. Where they do not fit, but we were given a core for each of our threads, the
    launcher has bound the ranks. All else may be crowded, and the system knows better.

    Args:
        cores: CPUs that this process may use, by physical core.
        node_cpus: CPUs of the node.
        local_rank: of this rank on its node.
        local_size: ranks on the node.
        threads: of each rank.
    """
    order = [core[i] for i in range(max(map(len, cores), default=0)) for core in cores if i < len(core)]
    taken = order[: local_size * threads]
    mine = taken[local_rank * threads : (local_rank + 1) * threads]
    if local_size * threads > len(order):
        is_bound = len(order) < node_cpus and len(cores) == threads > 1
        return Binding(frozenset(order), tuple(order[1:threads])) if is_bound else None
    spare = set(order[len(taken) :])
    return Binding(frozenset(mine) | spare, tuple(mine[1:]))


def _limit_spinning(crowded: bool) -> None:
    """Say how threads wait; must happen before OpenMP is loaded.

    libgomp's own limit is milliseconds at every barrier: a job whose core is also wanted by another process becomes
    some forty times slower, with this one by its share. It lasts for the steps between two barriers.
    """
    if crowded:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "OMP_WAIT_POLICY" not in os.environ or crowded:
        os.environ.setdefault("GOMP_SPINCOUNT", "0" if crowded else _SPINS)


def _bind(library: Library, binding: Binding | None) -> Library:
    if binding is None or not hasattr(os, "sched_setaffinity"):
        return library
    os.sched_setaffinity(0, binding.caller)
    bound = library._replace(workers=binding.workers)
    bound.bind_workers()
    return bound
