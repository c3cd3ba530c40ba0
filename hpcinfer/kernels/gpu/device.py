"""Which GPU is a rank's, and whether it can be used at all."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from hpcinfer.errors import ConfigError
from hpcinfer.units import format_bytes

_HINT = "or --device cpu"
_LEAST_FREE = 512 << 20  # bytes: kernels and the library need some for themselves
# what a driver says, in lower case: what is wrong, what was expected, and what to do
_REASONS = {
    "driver on your system is too old": (
        "the GPU driver is too old for this torch", "a driver for CUDA {cuda}",
        "install a torch for an older CUDA, or a newer driver",
    ),
    "no nvidia driver": ("no GPU driver", "a driver for CUDA {cuda}", "run on a node with GPUs"),
    "busy or unavailable": (
        "{gpu} is occupied", "a GPU that takes another process",
        "`nvidia-smi` says which processes use it, and whether its compute mode allows one alone",
    ),
    "out of memory": (
        "{gpu} has no memory left, not even to begin with", "a GPU that others do not fill",
        "`nvidia-smi` says which processes use it",
    ),
}  # fmt: skip
T = TypeVar("T")


def own_device(local_rank: int, local_size: int, ranks_per_gpu: int = 1) -> torch.device:
    """Find the GPU of a rank, by its number among the ranks of its node, and make it the current one. Not collective.

    A rank that sees a single GPU takes it: the launcher has dealt them out. Where there is none, and Triton is to
    interpret its kernels ($TRITON_INTERPRET, for tests), it is the CPU.

    Raises:
        ConfigError: a torch or driver that cannot use GPUs, no GPU, too few for the ranks, or one that others occupy.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available():
        return torch.device("cpu")
    version = torch.version.cuda or torch.version.hip
    if version is None:
        raise ConfigError(f"torch {torch.__version__}, built without CUDA", expected="one with CUDA, for --device cuda",
                          hint=f"install torch for this machine's CUDA, {_HINT}")  # fmt: skip
    count = torch.cuda.device_count()
    if count == 0:
        _explained(torch.cuda.init, "the GPU")
        raise ConfigError("no GPU that this process may use", expected="one for each rank, for --device cuda",
                          hint=f"`nvidia-smi` and $CUDA_VISIBLE_DEVICES say what is there, {_HINT}")  # fmt: skip
    if 1 < count < -(-local_size // ranks_per_gpu):
        raise ConfigError(f"{local_size} ranks on a node, {count} GPUs", expected=f"a GPU for {_each(ranks_per_gpu)}",
                          hint=f"start {count * ranks_per_gpu} ranks on each node, {_HINT}")  # fmt: skip
    index = 0 if count == 1 else local_rank // ranks_per_gpu
    _check_memory(index)
    return torch.device("cuda", index)


def _check_memory(index: int) -> None:
    """Make a GPU the current one, and see whether it takes this process and has memory."""
    name = f"GPU {index} of this node"
    _explained(lambda: torch.cuda.set_device(index), name)
    free, total = _explained(lambda: torch.cuda.mem_get_info(index), name)
    if free < _LEAST_FREE:
        raise ConfigError(f"{format_bytes(free)} of {format_bytes(total)} free on {name}",
                          expected="a GPU that others do not fill",
                          hint=f"`nvidia-smi` says which processes use it, {_HINT}")  # fmt: skip


def _explained(call: Callable[[], T], name: str) -> T:
    """Call, and say in our words what a driver objects to."""
    try:
        return call()
    except (RuntimeError, AssertionError) as error:
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        for words, (found, expected, hint) in _REASONS.items():
            if words in str(error).lower():
                version = torch.version.cuda or torch.version.hip
                raise ConfigError(f"{found.format(gpu=name)}: {text}", expected=expected.format(cuda=version),
                                  hint=f"{hint}, {_HINT}") from error  # fmt: skip
        raise ConfigError(f"{name} cannot be used: {text}", expected="a GPU for each rank, for --device cuda",
                          hint=f"`nvidia-smi` says what is there, {_HINT}") from error  # fmt: skip


def _each(ranks_per_gpu: int) -> str:
    return "each rank" if ranks_per_gpu == 1 else f"{ranks_per_gpu} ranks"
