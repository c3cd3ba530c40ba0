"""What fixes the bits of a GPU's kernels: the device, the compilers, and the digest of a few layers."""

import torch
import triton

from hpcinfer.kernels.gpu.codes import has_fp8
from hpcinfer.kernels.probe import probe_digest
from hpcinfer.kernels.protocol import Kernels

_VERSION = "triton-2"  # changes whenever a bit of a result may
_PRECISIONS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"))


def gpu_profile(kernels: Kernels, device: torch.device, *, reproducible: bool) -> dict[str, str]:
    """Describe a device and its kernels; see `Kernels.profile`."""
    is_gpu = device.type == "cuda"
    return {
        "kernels": _VERSION if reproducible else f"{_VERSION}, library products",
        "device": torch.cuda.get_device_name(device) if is_gpu else "interpreter",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if is_gpu else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "fp8_weights": f"{'fp8' if has_fp8(device) else 'float16'} products",
        "probe": probe_digest(kernels, _PRECISIONS),
    }
