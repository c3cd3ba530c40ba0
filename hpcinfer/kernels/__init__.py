"""The array functions of a model behind one protocol, and their implementations."""

import logging
from typing import NamedTuple

from hpcinfer.errors import ConfigError
from hpcinfer.kernels.protocol import Kernels

KERNEL_SETS = ("auto", "native", "reference")

logger = logging.getLogger(__name__)


class Placement(NamedTuple):
    """Which of a node's CPUs the threads of a rank may take."""

    threads: int = 1
    local_rank: int | None = 0  # None: not known, so that threads stay where the system puts them
    local_size: int = 1  # ranks on the node


class GpuOptions(NamedTuple):
    """What kernels of GPUs may be asked for."""

    dtype: str = "bfloat16"  # of products
    reproducible: bool = True  # bits that depend on neither batch nor mesh
    graphs: bool = True  # decode steps are recorded
    ranks_per_gpu: int = 1


_ALONE, _GPU = Placement(), GpuOptions()


def create_kernels(
    name: str = "auto", device: str = "cpu", placement: Placement = _ALONE, gpu: GpuOptions = _GPU
) -> Kernels:
    """Build a kernel set by name; only then are its libraries imported.

    "auto" takes the native kernels where they were built, else the reference kernels, with a warning.

    Args:
        name: of the set, on CPUs.
        device: cpu, or cuda: the GPU of this rank.
        placement: of the rank on its node.
        gpu: what matters on a GPU alone; products of CPUs are float32.

    Raises:
        ConfigError: a name or device that is not there, or native kernels that were not built.
    """
    if name not in KERNEL_SETS:
        raise ConfigError(f"kernels {name!r}", expected=f"one of {', '.join(KERNEL_SETS)}")
    if device == "cuda":
        return _create_gpu_kernels(name, placement, gpu)
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device {device!r}", expected="cpu or cuda")
    if name != "reference":
        from hpcinfer.kernels.native import create_native_kernels

        kernels = create_native_kernels(placement)
        if kernels is not None:
            return kernels
        _missing(name)
    from hpcinfer.kernels.reference import ReferenceKernels

    return ReferenceKernels(placement.threads)


def _create_gpu_kernels(name: str, placement: Placement, options: GpuOptions) -> Kernels:
    if name != "auto":
        raise ConfigError(f"--kernels {name} on a GPU", expected="--kernels auto", hint=f"{name} kernels run on CPUs")
    from hpcinfer.kernels.gpu import create_gpu_kernels
    from hpcinfer.kernels.gpu.device import own_device

    device = own_device(placement.local_rank or 0, placement.local_size, options.ranks_per_gpu)
    return create_gpu_kernels(
        device, reproducible=options.reproducible, dtype=options.dtype, graphs=options.graphs,
        num_sharers=options.ranks_per_gpu,
    )  # fmt: skip


def _missing(name: str) -> None:
    found, hint = "no native kernels here", "install hpcinfer again where a C compiler and Python.h are"
    if name == "native":
        raise ConfigError(found, expected="a C compiler at installation", hint=hint)
    logger.warning("%s: the reference kernels run, several times slower (%s)", found, hint)
