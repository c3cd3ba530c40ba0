"""The kernels of GPUs for tests: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch


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
        from triton.runtime import interpreter

        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _one_chain)
        _patch_once(patch, interpreter)
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


def _one_chain(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter's products, as a GPU makes them: numpy's library treats rows by their place in a tile."""
    from triton.runtime.interpreter import TensorHandle

    left, right, total = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype), d.data.copy()
    for k in range(len(right)):
        total += left[:, k, None] * right[k]
    return TensorHandle(total, d.dtype.scalar)


def _patch_once(patch, interpreter):
    """Let the interpreter patch Triton's language once, not in every launch and call: that is most of its time."""
    from triton import language

    from hpcinfer.kernels.gpu import rows

    for function in (rows.silu_times, language.zeros):  # one sees triton.language, the other triton.language.core
        interpreter._patch_lang(function.fn)
    patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    patch.setattr(interpreter.InterpretedFunction, "__call__",
                  lambda function, *args, **kwargs: function.rewrite()(*args, **kwargs))  # fmt: skip
