"""Compile norms for compute capability 9.0, and run none: how each lays out what it adds up, by size and type, as JSON.

A process of its own, without Triton's interpreter.
"""

import json
import re

import torch
from compile_only import found, jit, run


def note_layout(function, *args, grid, warmup, **options):
    """In the place of a launch."""
    code = run(function, *args, grid=grid, warmup=True, **options).asm["ttgir"]
    operand, *_ = re.findall(r"\}\) : \(tensor<\d+xf32, (#\w+)>\) -> f32", code)  # the largest is sought later
    found.append(re.search(rf"^{operand} = (.*)$", code, re.MULTILINE)[1])


jit.JITFunction.run = note_layout

from hpcinfer.kernels.gpu.residual import Residuals  # noqa: E402
from hpcinfer.kernels.gpu.rows import rms_norm  # noqa: E402

if __name__ == "__main__":
    layouts, residuals = {}, Residuals()
    cases = (896, "bfloat16"), (4096, "float32"), (4096, "int8"), (4096, "float8_e4m3fn"), (8192, "float16")
    for size, name in cases:
        dtype = getattr(torch, name)
        x, weight = torch.zeros(2, size), torch.ones(size)
        found.clear()
        rms_norm(x, weight, 1e-5, dtype)
        for bias in (None, weight):
            residuals.around(
                lambda x=x, bias=bias, weight=weight, dtype=dtype: residuals.norm(
                    residuals.add(x, x.clone(), bias), weight, 1e-5, dtype
                )
            )()
        layouts[f"{size} {name}"] = found.copy()
    print(json.dumps(layouts))
