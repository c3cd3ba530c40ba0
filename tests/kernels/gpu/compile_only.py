"""Compile what a layer launches for compute capability 9.0, and run none of it: what came out, as JSON.

A process of its own, without Triton's interpreter. Usage: compile_only.py DTYPE,CACHE_DTYPE,NUM_TOKENS,HEAD_SIZE ...
"""

import json
import re
import sys

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


class Driver:
    """A GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(function, *args, grid, warmup, **options):
    """In the place of a launch."""
    kernel = run(function, *args, grid=grid, warmup=True, **options)
    ptx = kernel.asm["ptx"]
    found.append({
        "kernel": function.fn.__name__,
        "matrix": sorted(set(re.findall(r"wgmma\.mma_async[\w.]*|\bmma\.sync[\w.]*", ptx))),
        "contracted": "fma.rn.f32" in ptx,
        "imprecise": "div.full" in ptx or "div.approx" in ptx,
        "shared": kernel.metadata.shared,
    })  # fmt: skip
    return kernel


driver.set_active(Driver())
found, run = [], jit.JITFunction.run
jit.JITFunction.run = compile_only

from hpcinfer.config import RopeScaling  # noqa: E402
from hpcinfer.kernels.gpu import codes, products  # noqa: E402
from hpcinfer.kernels.gpu.gpu import GpuKernels  # noqa: E402
from hpcinfer.kernels.protocol import (  # noqa: E402
    AttentionShape,
    AttentionWeights,
    HeadLayout,
    Linear,
    MlpWeights,
    StepInput,
    Weight,
)


def weight(dtype, units, outs, ins):
    """Zeros of a type."""
    if dtype in ("int8", "float8_e4m3"):
        codes = np.zeros((units, outs, ins), np.int8 if dtype == "int8" else np.uint8)
        return Weight(codes, dtype, np.ones((units, outs), np.float32))
    return Weight(np.zeros((units, outs, ins), {"float32": np.float32, "bfloat16": np.uint16}[dtype]), dtype)


def launch_all(dtype, cache_dtype, num_tokens, size):
    """One layer, at a position with more than one split of keys."""
    kernels, norm, places = GpuKernels(torch.device("cpu")), np.ones(64, np.float32), np.arange(num_tokens)
    q, k, o = (weight(dtype, *shape) for shape in ((2, 2 * size, 64), (1, size, 64), (2, 64, 2 * size)))
    layout, rope = HeadLayout(size, 2, (2, 2), (0,) * 4), kernels.rope_table(2500, size, 1e4, RopeScaling())
    weights = AttentionWeights(norm, Linear(q), Linear(k), Linear(k), o, np.ones(size), np.ones(size))
    layer = kernels.prepare_attention(weights, AttentionShape(layout, 1e-5, rope))
    step = StepInput(places, 2000 + places, places, np.array([0, num_tokens]), np.array([2000 + num_tokens]),
                     np.arange(150), np.array([0, 150]), places)  # fmt: skip
    x = torch.zeros(num_tokens, 64)
    kernels.attention(x, layer, step, kernels.kv_cache(150, 16, 1, size, cache_dtype), [(0, 2)])
    kernels.mlp(x, kernels.prepare_mlp(MlpWeights(norm, Linear(q), Linear(q), o), 1e-5), [(0, 2)])
    kernels.embed(kernels.prepare_table(q), (0, 2 * size), (2 * size,) * 2, places)


if __name__ == "__main__":
    products.tiles_are_alike, results = lambda *args: True, {}
    for case in sys.argv[1:]:
        codes.has_fp8 = lambda device, has_fp8="without" not in case: has_fp8
        dtype, cache_dtype, num_tokens, head_size = case.removesuffix(",without fp8").split(",")
        found.clear()
        launch_all(dtype, cache_dtype, int(num_tokens), int(head_size))
        results[case] = found.copy()
    print(json.dumps(results))
