"""Which GPU a rank gets, and what is said where there is none."""

import pytest
import torch

from hpcinfer.config import ModelOptions
from hpcinfer.engine.placement import make_kernels, resolve_cache_dtype, resolve_dtype
from hpcinfer.errors import ConfigError
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.gpu.device import own_device
from hpcinfer.partition.mesh import Mesh


@pytest.fixture
def gpus(monkeypatch):
    """Makes so many GPUs visible; the list is of those that were made current."""

    def see(count, version="12.9"):
        current = []
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return see


@pytest.mark.parametrize(("count", "local_rank", "local_size", "index"), [(4, 2, 4, 2), (8, 3, 4, 3), (1, 3, 4, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(gpus, count, local_rank, local_size, index):
    current = gpus(count)
    assert own_device(local_rank, local_size) == torch.device("cuda", index)
    assert current == [index]


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


@pytest.mark.parametrize("mesh", [Mesh(1, 1, 2), Mesh(2, 2, 1)])
def test_a_replica_has_one_gpu(mesh):
    with pytest.raises(ConfigError, match="one GPU for each replica"):
        make_kernels(ModelOptions(device="cuda"), None, mesh)


def test_what_auto_precision_is():
    assert resolve_dtype(ModelOptions()) == resolve_cache_dtype(ModelOptions()) == "float32"
    on_gpu = ModelOptions(device="cuda")
    assert resolve_dtype(on_gpu) == resolve_cache_dtype(on_gpu) == "bfloat16"
    assert resolve_cache_dtype(ModelOptions(dtype="float16", kv_cache_dtype="int8")) == "int8"
    assert resolve_cache_dtype(ModelOptions(device="cuda", dtype="float16")) == "float16"
