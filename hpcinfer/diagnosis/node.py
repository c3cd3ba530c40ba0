"""What a rank sees of its node: CPUs and threads, software, limits, shared memory."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from hpcinfer import __version__
from hpcinfer.engine.placement import resolve_threads
from hpcinfer.errors import ConfigError
from hpcinfer.kernels.native.library import available_cpus, cores_of, instruction_sets, load

_PACKAGES = ("numpy", "h5py", "mpi4py", "tokenizers", "jinja2", "torch")
_LIMITS = ("NOFILE", "NPROC", "AS", "MEMLOCK", "FSIZE", "CPU")  # as the module `resource` calls them
_BACKING = "OMPI_MCA_btl_sm_backing_directory"


class Processors(NamedTuple):
    """The CPUs of a rank."""

    cpus: tuple[int, ...]  # that it may run on
    cores: int  # physical ones among them
    node_cpus: int  # of the whole node
    threads: int  # of its kernels
    model: str
    problem: str = ""  # what is wrong with the number of threads that was asked for


class Software(NamedTuple):
    """What is installed, as this rank finds it."""

    versions: dict[str, str]  # "" is missing
    instruction_sets: tuple[str, ...] = ()  # of the native kernels, best first; none where they were not built
    problem: str = ""


class Limit(NamedTuple):
    """A limit of this process; -1 is unlimited."""

    soft: int
    hard: int


class SharedMemory(NamedTuple):
    """The file system through which ranks of a node exchange messages."""

    path: str
    device: int = 0
    free_bytes: int = -1  # -1 where there is none


def read_processors(threads: int | None) -> Processors:
    """Look at the CPUs; must happen before kernels bind their threads."""
    cpus, problem, count = available_cpus(), "", 1
    try:
        count = resolve_threads(threads, os.environ)
    except ConfigError as error:
        problem = f"{error.found}: expected {error.expected}"
    return Processors(tuple(sorted(cpus)), len(cores_of(cpus)), os.cpu_count() or 1, count, _cpu_model(), problem)


def read_software() -> Software:
    """Find versions and instruction sets; torch is looked for, not imported."""
    versions = {"hpcinfer": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            versions[package] = version(package) if importlib.util.find_spec(package) else ""
        except PackageNotFoundError:
            versions[package] = ""
    try:
        library = load(1, None, 1)
    except ConfigError as error:
        return Software(versions, problem=f"{error.found}: expected {error.expected}")
    return Software(versions, tuple(instruction_sets(library)) if library else ())


def read_limits() -> dict[str, Limit]:
    """Limits of this process, by name; none where the system has no such thing."""
    try:
        import resource
    except ImportError:
        return {}
    pairs = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
             for name in _LIMITS if hasattr(resource, f"RLIMIT_{name}")}
    return {name: Limit(_finite(soft), _finite(hard)) for name, (soft, hard) in pairs.items()}


def read_shared_memory(environment: Mapping[str, str] = os.environ) -> SharedMemory:
    """Look at the directory that MPI uses."""
    path = environment.get(_BACKING, "/dev/shm")
    try:
        room = os.statvfs(path)
        return SharedMemory(path, os.stat(path).st_dev, room.f_bavail * room.f_frsize)
    except OSError:
        return SharedMemory(path)


def _finite(limit: int) -> int:
    return limit if 0 <= limit < 2**63 - 1 else -1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
