"""Compile what sampling launches for compute capability 9.0, and run none of it: what came out, as JSON."""

import json

import compile_only
import torch

from hpcinfer.kernels.gpu.sampling import GpuSampling
from hpcinfer.kernels.protocol import Draw

if __name__ == "__main__":
    sampling, sizes = GpuSampling(torch.device("cpu")), (16032,) * 8
    logits = torch.zeros(1, 8, 16064)
    sampling.best(logits, sizes)
    sampling.draw(logits, sizes, [Draw(1.0, top_k=50, top_p=0.9)])
    sampling.score(logits, sizes, torch.zeros(1, dtype=torch.int64), 20)
    print(json.dumps(compile_only.found))
