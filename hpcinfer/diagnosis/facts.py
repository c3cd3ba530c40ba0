"""What one rank sees, gathered without asking the other ranks."""

import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcinfer.comm.launcher import Launch, read_launch
from hpcinfer.comm.library import MpiLibrary
from hpcinfer.comm.topology import machine_id
from hpcinfer.diagnosis.devices import Devices, read_devices
from hpcinfer.diagnosis.node import (
    Limit,
    Processors,
    SharedMemory,
    Software,
    read_limits,
    read_processors,
    read_shared_memory,
    read_software,
)
from hpcinfer.diagnosis.places import ANSWER_LIMIT_S, Place, answer_within, look_at
from hpcinfer.diagnosis.trial import Trial, try_out
from hpcinfer.errors import ConfigError
from hpcinfer.weights.locate import find_model
from hpcinfer.weights.store_format import INDEX_FILE

FOREIGN_RANKS = (
    "PALS_RANKID", "ALPS_APP_PE", "MV2_COMM_WORLD_RANK", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK", "PMIX_RANK",
)  # fmt: skip  # that launchers set which `hpcinfer.comm.launcher` does not read
_VARIABLES = (
    "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_JOB_END_TIME", "SLURM_CPUS_ON_NODE",
    "SLURM_GPUS_ON_NODE", "SLURMD_NODENAME", "PMIX_NAMESPACE",
    "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY",
    *FOREIGN_RANKS,
)  # fmt: skip  # by name: an environment holds passwords and tokens, too


@dataclass(frozen=True)
class DoctorOptions:
    """What the job will be."""

    model: str = ""
    output: str = ""
    cache_dir: str | None = None
    threads: int | None = None
    tp: int = 1
    pp: int = 1


@dataclass(frozen=True)
class Facts:
    """What a rank sees."""

    rank: int
    world_size: int  # of the MPI world
    host: str
    machine: str  # equal where the kernel is the same: containers and virtual hosts share one
    launch: Launch
    environment: dict[str, str]
    mpi: MpiLibrary
    processors: Processors
    software: Software
    limits: dict[str, Limit]
    shared_memory: SharedMemory
    devices: Devices
    places: tuple[Place, ...] = ()
    trial: Trial | None = None  # of the directory of the output, on the first rank of each node


def read_facts(options: DoctorOptions, mpi: MpiLibrary, rank: int, world_size: int) -> Facts:
    """Look at everything that this rank can see by itself; a file system that hangs costs seconds, not the doctor."""
    launch, output = read_launch(), Path(options.output)
    processors = read_processors(options.threads)
    is_first = launch.local_rank in (0, None)
    return Facts(
        rank=rank, world_size=world_size, host=socket.gethostname(), machine=machine_id(), launch=launch,
        environment=read_environment(), mpi=mpi, processors=processors, software=read_software(),
        limits=read_limits(), shared_memory=read_shared_memory(), devices=read_devices(),
        places=read_places(options) if is_first else (),
        trial=try_out(output.absolute().parent) if options.output and is_first else None,
    )  # fmt: skip


def read_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that findings are made of."""
    return {name: environment[name] for name in _VARIABLES if name in environment}


def read_places(options: DoctorOptions, environment: Mapping[str, str] = os.environ) -> tuple[Place, ...]:
    """Look at the file systems of model, output, caches, temporary files and Python."""
    home = Path(environment.get("HOME", "/"))
    folders = {
        "user caches": Path(environment.get("XDG_CACHE_HOME") or home / ".cache"),
        "Triton's cache": Path(environment.get("TRITON_CACHE_DIR") or home / ".triton"),
        "temporary files": Path(tempfile.gettempdir()),
        "Python": Path(sys.prefix),
    }
    places = list(_model_places(options, environment)) if options.model else []
    if options.output:
        places.append(look_at("output", Path(options.output).absolute().parent, needs_write=True))
    return (*places, *(look_at(use, path) for use, path in folders.items()))


def _model_places(options: DoctorOptions, environment: Mapping[str, str]) -> list[Place]:
    """The model, and where its store will be made if it is none yet."""
    try:
        folder = answer_within(ANSWER_LIMIT_S, lambda: find_model(options.model))
        identity, size = answer_within(ANSWER_LIMIT_S, lambda: _identify(folder))
    except (ConfigError, OSError) as error:
        found = error.found if isinstance(error, ConfigError) else str(error)
        return [look_at("model", Path(options.model))._replace(problem=found)]
    places = [look_at("model", folder)._replace(identity=identity)]
    if not (folder / INDEX_FILE).is_file():
        named = options.cache_dir or environment.get("HPCINFER_CACHE") or (options.output and f"{options.output}.job")
        if named:
            places.append(look_at("store", Path(named), needs_write=True)._replace(needed_bytes=size))
    return places


def _identify(folder: Path) -> tuple[str, int]:
    """What tells the content of a model's folder from another's, and the bytes of its weights."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    names = [name for name in sizes if name.endswith((".json", ".h5", ".safetensors"))]
    return " ".join(f"{name}:{sizes[name]}" for name in names), sum(sizes[name] for name in names)
