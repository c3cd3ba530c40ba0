"""The kernels of GPUs for tests: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch
from interpreter import play_gpu


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where the kernels run. The modules of hpcinfer.kernels.gpu may be imported only once this is there."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
            pytest.skip("Triton was imported before, without its interpreter")
        patch.setenv("TRITON_INTERPRET", "1")
        play_gpu(patch)
        yield torch.device("cpu")


@pytest.fixture(scope="session")
def make(device):
    """Makes kernels, with the options of `create_gpu_kernels`."""
    from hpcinfer.kernels.gpu import create_gpu_kernels

    return lambda **options: create_gpu_kernels(device, **options)


@pytest.fixture(scope="session")
def on_device(device):
    """Copies numpy arrays and tensors to the device."""
    return lambda array: torch.as_tensor(array).to(device)
