"""Which GPU a rank gets, and what is said where there is none."""

import pytest
import torch

from hpcinfer.config import ModelOptions
from hpcinfer.engine.placement import make_kernels, resolve_cache_dtype, resolve_dtype
from hpcinfer.errors import ConfigError
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.gpu.device import own_device


@pytest.fixture
def gpus(monkeypatch):
    """Makes so many GPUs visible; the list is of those that were made current."""

    def see(count, version="12.9"):
        current = []
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (130 << 30, 140 << 30))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return current

    return see


@pytest.mark.parametrize(("count", "local_rank", "local_size", "ranks_per_gpu", "index"), [
    (4, 2, 4, 1, 2), (8, 3, 4, 1, 3), (1, 3, 4, 1, 0), (2, 3, 4, 2, 1), (2, 2, 3, 2, 1), (1, 1, 2, 2, 0),
])  # fmt: skip
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(
    gpus, count, local_rank, local_size, ranks_per_gpu, index
):
    current = gpus(count)
    assert own_device(local_rank, local_size, ranks_per_gpu) == torch.device("cuda", index)
    assert current == [index]


def test_rocm_counts_as_cuda(gpus, monkeypatch):
    gpus(1, None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert own_device(0, 1) == torch.device("cuda", 0)


def test_too_few_gpus_for_ranks_that_share_them(gpus):
    gpus(2)
    with pytest.raises(ConfigError, match="5 ranks on a node, 2 GPUs") as caught:
        own_device(0, 5, 2)
    assert "start 4 ranks" in str(caught.value) and "a GPU for 2 ranks" in str(caught.value)


@pytest.mark.parametrize(("call", "says", "words", "more"), [
    ("init", "The NVIDIA driver on your system is too old (found version 12040). Please\nupdate",
     r"too old for this torch.*12040", "a driver for CUDA 12.9"),
    ("init", "Found no NVIDIA driver on your system.", "no GPU driver", "a driver for CUDA 12.9"),
    ("set_device", "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with", "GPU 1 .*occupied",
     "compute mode"),
    ("mem_get_info", "CUDA error: out of memory", "GPU 1 of this node has no memory left", "which processes"),
    ("mem_get_info", "CUDA error: unspecified launch failure", "GPU 1 .* cannot be used: CUDA error: unspec", "nvidia"),
])  # fmt: skip
def test_what_the_driver_objects_to_is_explained(gpus, monkeypatch, call, says, words, more):
    def object_to(*args):
        raise RuntimeError(says)

    gpus(0 if call == "init" else 2)
    monkeypatch.setattr(torch.cuda, call, object_to)
    with pytest.raises(ConfigError, match=words) as caught:
        own_device(1, 2)
    assert more in str(caught.value) and "--device cpu" in str(caught.value) and "Compile with" not in str(caught.value)


def test_a_gpu_that_others_fill_is_refused(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 << 20, 140 << 30))
    with pytest.raises(ConfigError, match=r"100\.0 MiB of 140\.0 GiB free on GPU 0"):
        own_device(0, 1)


def test_the_interpreter_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert own_device(3, 4) == torch.device("cpu")


@pytest.mark.parametrize(("count", "version", "words"), [
    (0, None, "built without CUDA"), (0, "12.9", "no GPU that this process may use"),
    (2, "12.9", "4 ranks on a node, 2"),
])
def test_too_few_gpus_are_an_error_that_says_what_to_do(gpus, count, version, words):
    gpus(count, version)
    with pytest.raises(ConfigError, match=words) as caught:
        own_device(0, 4)
    assert "--device cpu" in str(caught.value)


def test_kernels_of_cpus_are_none_of_gpus():
    with pytest.raises(ConfigError, match="--kernels native on a GPU"):
        create_kernels("native", "cuda")
    with pytest.raises(ConfigError, match="expected: cpu or cuda"):
        create_kernels("auto", "tpu")


def test_a_cache_of_fp8_is_for_gpus():
    with pytest.raises(ConfigError, match="fp8 on CPUs") as caught:
        make_kernels(ModelOptions(kv_cache_dtype="fp8"), None)
    assert "int8" in str(caught.value)


def test_what_auto_precision_is():
    assert resolve_dtype(ModelOptions()) == resolve_cache_dtype(ModelOptions()) == "float32"
    on_gpu = ModelOptions(device="cuda")
    assert resolve_dtype(on_gpu) == resolve_cache_dtype(on_gpu) == "bfloat16"
    assert resolve_cache_dtype(ModelOptions(dtype="float16", kv_cache_dtype="int8")) == "int8"
    assert resolve_cache_dtype(ModelOptions(device="cuda", dtype="float16")) == "float16"
