import pytest
from models import make_tiny_model

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions
from hpcinfer.engine.replica import ReplicaOptions, build_replica, check_engine_options
from hpcinfer.errors import ConfigError
from hpcinfer.kernels import create_kernels
from hpcinfer.partition.mesh import Mesh
from hpcinfer.weights.conversion import convert
from hpcinfer.weights.reader import Store


@pytest.mark.parametrize("options", [
    {"max_num_seqs": 0}, {"max_num_batched_tokens": -1}, {"block_size": 0}, {"kv_cache_memory": "much"},
])  # fmt: skip
def test_engine_options_out_of_range_are_refused_by_name(options):
    [(name, value)] = options.items()
    words = "much" if value == "much" else f"--{name.replace('_', '-')} {value}"
    with pytest.raises(ConfigError, match=words):
        check_engine_options(EngineOptions(**options))


def test_default_engine_options_are_accepted():
    check_engine_options(EngineOptions())


def test_cache_beyond_the_memory_is_refused_with_its_size(tmp_path, monkeypatch):
    convert(make_tiny_model(tmp_path / "model", "llama"), tmp_path / "store", SerialGroup())
    kernels = create_kernels("reference")

    def kv_cache(*sizes):
        raise MemoryError

    monkeypatch.setattr(kernels, "kv_cache", kv_cache)
    options = ReplicaOptions(EngineOptions(kv_cache_memory="2MiB"), "float32", 64, seed=0)
    with pytest.raises(ConfigError, match=r"KV cache of 2\.0 MiB per rank") as caught:
        build_replica(SerialGroup(), Mesh(1, 1, 1), Store.open(tmp_path / "store"), kernels, options)
    assert "--kv-cache-memory" in str(caught.value)
