"""What fixes the bits of a GPU's kernels: the device, the compilers, and the digest of a few layers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton

from hpcinfer.config import RopeScaling
from hpcinfer.dtypes import round_to
from hpcinfer.kernels.protocol import (
    AttentionShape,
    AttentionWeights,
    HeadLayout,
    Linear,
    MlpWeights,
    StepInput,
    Weight,
)

if TYPE_CHECKING:
    from hpcinfer.kernels.gpu.gpu import GpuKernels

_VERSION = "triton-1"  # changes whenever a bit of a result may
_TOKENS, _HIDDEN, _HEAD = 70, 64, 32


def gpu_profile(kernels: GpuKernels, device: torch.device, *, reproducible: bool) -> dict[str, str]:
    """Describe a device and its kernels; see `Kernels.profile`."""
    is_gpu = device.type == "cuda"
    return {
        "kernels": _VERSION if reproducible else f"{_VERSION}, library products",
        "device": torch.cuda.get_device_name(device) if is_gpu else "interpreter",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if is_gpu else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "probe": probe_digest(kernels),
    }


def probe_digest(kernels: GpuKernels) -> str:
    """Hash what a layer makes of fixed numbers, in each type of products."""
    digest, rope = hashlib.sha256(), kernels.rope_table(_TOKENS, _HEAD, 1e4, RopeScaling())
    shape = AttentionShape(HeadLayout(_HEAD, 1, (1, 1), (0, 0)), 1e-5, rope)
    for dtype in ("float32", "bfloat16", "float16"):
        o, q, k = (_weight(dtype, *sizes) for sizes in ((2, _HIDDEN, _HEAD), (2, _HEAD, _HIDDEN), (1, _HEAD, _HIDDEN)))
        norm, x = _numbers(_HIDDEN), kernels.device(_numbers(_TOKENS, _HIDDEN))
        attention = kernels.prepare_attention(AttentionWeights(norm, Linear(q), Linear(k), Linear(k), o), shape)
        mlp = kernels.prepare_mlp(MlpWeights(norm, Linear(q), Linear(q), o), 1e-5)
        cache = kernels.kv_cache(5, 16, 1, _HEAD, dtype)
        for nodes in (kernels.attention(x, attention, _step(), cache, [(0, 2)]), kernels.mlp(x, mlp, [(0, 2)])):
            digest.update(kernels.host(nodes[0]).tobytes())
        digest.update(kernels.logits(x, np.arange(3), kernels.prepare_head(norm, q, 1e-5)).tobytes())
    return digest.hexdigest()[:16]


def _numbers(*shape: int) -> np.ndarray:
    """Numbers from -1 to 1 that depend on their place alone."""
    places = np.arange(np.prod(shape), dtype=np.int64)
    return (places * 7919 % 65537 / np.float32(32768) - 1).astype(np.float32).reshape(shape)


def _weight(dtype: str, units: int, num_out: int, num_in: int) -> Weight:
    return Weight(round_to(_numbers(units, num_out, num_in), dtype), dtype)


def _step() -> StepInput:
    places = np.arange(_TOKENS)
    return StepInput(
        token_ids=places, positions=places, slots=places, query_starts=np.array([0, _TOKENS]),
        context_lens=np.array([_TOKENS]), block_tables=np.arange(5), table_starts=np.array([0, 5]), logit_tokens=places,
    )  # fmt: skip
