"""The kernels of GPUs: Triton for what a model does with arrays, torch for memory and for products without a contract.

With TRITON_INTERPRET=1, set before Triton is imported, they run on tensors in a CPU's memory, slowly: for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hpcinfer.kernels.protocol import Kernels


def create_gpu_kernels(
    device: torch.device, *, reproducible: bool = True, dtype: str = "auto", graphs: bool = True,
    num_sharers: int = 1,
) -> Kernels:  # fmt: skip
    """Build the kernels of one GPU; only then is Triton imported.

    Args:
        device: of all arrays.
        reproducible: whether bits depend on neither batch, chunk, block size nor mesh; else products are the library's.
        dtype: of products: float32, bfloat16, float16; "auto" is that of the weights, bfloat16 for quantised ones.
        graphs: whether decode steps are recorded and repeated.
        num_sharers: ranks that share the device.

    Raises:
        ConfigError: Triton is missing, or cannot use this device.
    """
    try:
        import triton
    except ImportError:
        hint = "install triton, or run on CPUs"
        raise ConfigError("no Triton here", expected="the package triton, for kernels of GPUs", hint=hint) from None
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ConfigError("Triton's kernels on a CPU", expected="a GPU", hint="TRITON_INTERPRET=1 is for tests")
    from hpcinfer.kernels.gpu.gpu import GpuKernels

    return GpuKernels(device, reproducible=reproducible, dtype=dtype, graphs=graphs, num_sharers=num_sharers)
