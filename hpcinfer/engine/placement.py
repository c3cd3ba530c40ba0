"""The kernels of a rank: which set, how many threads, and where on the node they may run."""

import os
from collections.abc import Mapping

from hpcinfer.agree import on_all
from hpcinfer.comm.launcher import read_launch
from hpcinfer.comm.protocol import Collectives
from hpcinfer.config import ModelOptions
from hpcinfer.errors import ConfigError
from hpcinfer.kernels import GpuOptions, Placement, create_kernels
from hpcinfer.kernels.protocol import Kernels

MAX_THREADS = 1024  # of a rank


def make_kernels(options: ModelOptions, threads: int | None) -> Kernels:
    """Build the kernels that the options ask for, with the threads of this rank.

    Not collective.

    Raises:
        ConfigError: a wrong number of threads, kernels or a GPU that are not there, or types that they do not have.
    """
    if options.kv_cache_dtype == "fp8" and options.device != "cuda":
        raise ConfigError("--kv-cache-dtype fp8 on CPUs", expected="a GPU", hint="int8 takes as many bytes")
    if options.ranks_per_gpu < 1:
        raise ConfigError(f"--ranks-per-gpu {options.ranks_per_gpu}", expected="at least 1")
    launch, count = read_launch(os.environ), resolve_threads(threads, os.environ)
    placement = Placement(count, 0 if launch.size == 1 else launch.local_rank, launch.local_size)
    gpu = GpuOptions(resolve_dtype(options), options.reproducible, options.cuda_graphs, options.ranks_per_gpu)
    return create_kernels(options.kernels, options.device, placement, gpu)


def check_sharing(world: Collectives, kernels: Kernels, ranks_per_gpu: int) -> None:
    """Check that no GPU has more ranks than were asked for, as where each rank sees one and the same.

    Collective over the world.

    Raises:
        ConfigError: one has.
    """
    arrays = kernels.device_arrays()
    gpu = arrays.gpu_id if arrays is not None and kernels.free_bytes() is not None else ""
    sharers = [rank for rank, told in enumerate(world.all_gather_bytes(gpu.encode())) if told and told == gpu.encode()]

    def check() -> None:
        if len(sharers) > ranks_per_gpu:
            raise ConfigError(
                f"ranks {', '.join(map(str, sharers))} have one GPU, {gpu}", expected=f"{ranks_per_gpu} on each",
                hint="srun --gpus-per-task=1, fewer ranks on a node, or --ranks-per-gpu",
            )

    on_all(world, check)


def resolve_dtype(options: ModelOptions) -> str:
    """Resolve the precision of weights; "auto" is float32 on CPUs, which holds every stored value, bfloat16 on GPUs.

    Not collective.
    """
    return {"cuda": "bfloat16"}.get(options.device, "float32") if options.dtype == "auto" else options.dtype


def resolve_cache_dtype(options: ModelOptions) -> str:
    """Resolve the precision of the KV cache; "auto" is that of the weights, before any quantisation. Not collective."""
    return resolve_dtype(options) if options.kv_cache_dtype == "auto" else options.kv_cache_dtype


def resolve_threads(wanted: int | None, environment: Mapping[str, str]) -> int:
    """Resolve --threads: what was asked for, else what the launcher gives a rank, else 1.

    What mpirun's ranks inherit from a Slurm allocation is not said of them.

    Not collective.

    Raises:
        ConfigError: less than one, more than MAX_THREADS, or a variable that holds no number.
    """
    if wanted is not None:
        return _checked(wanted, f"--threads {wanted}")
    is_srun = read_launch(environment).launcher in ("srun", "")
    for name in ("OMP_NUM_THREADS", *(["SLURM_CPUS_PER_TASK"] if is_srun else [])):
        text = environment.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS may be a list, a number per level
        if text:
            found = f"{name}={environment[name]}"
            return _checked(int(text) if text.isascii() and text.isdigit() else 0, found)
    return 1


def _checked(count: int, found: str) -> int:
    if not 1 <= count <= MAX_THREADS:
        raise ConfigError(found, expected=f"a number of threads from 1 to {MAX_THREADS}", hint="--threads N says it")
    return count
