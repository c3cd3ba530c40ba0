"""A real GPU, or a reason why not. Nothing here runs in Triton's interpreter: tests/kernels/gpu does."""

import importlib.util
from functools import partial

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The first GPU that this process sees."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def make(gpu):
    """Makes kernels of the GPU, with the options of `create_gpu_kernels`."""
    from hpcinfer.kernels.gpu import create_gpu_kernels

    return partial(create_gpu_kernels, gpu)
