"""Weights come to the GPU as they are stored, and leave nothing else there."""

import numpy as np
import pytest
import torch
from gpu_replicas import RandomStore, llama

from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_stage
from hpcinfer.partition.mesh import Mesh

CONFIG = llama(num_layers=4)
MATRICES = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "attention",
            "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}  # fmt: skip


def load(kernels, store):
    """Load all of a model."""
    mesh = Mesh(1, 1, 1)
    weights = load_stage(store, kernels, shard_plan(store.config, store.grains, mesh, mesh.coord(0)), LoadOptions())
    torch.cuda.synchronize()
    return weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "float8_e4m3"])
def test_what_is_given_back_is_what_was_stored(make, dtype):
    kernels, store = make(), RandomStore(CONFIG, dtype)
    weights = load(kernels, store)
    for layer, loaded in enumerate(weights.layers):
        for name, half in MATRICES.items():
            stored = store.read_weight(f"layers.{layer}.{name}.weight")
            units = range(len(stored.values))
            found = kernels.give_back(getattr(loaded, half), name, units)
            expected = stored.values
            if dtype == "bfloat16":
                expected = (expected.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(found.values, expected)
            if stored.scales is not None:
                np.testing.assert_array_equal(found.scales, stored.scales)


def test_loading_leaves_no_copies(make):
    kernels, store = make(), RandomStore(CONFIG, "bfloat16")
    load(kernels, store)  # what is kept for the next loading is there now
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    weights = load(kernels, store)
    taken, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    size = sum(store.read_weight(name)[0].nbytes for name in store.specs if name.endswith("proj.weight"))
    size += 2 * store.read_weight("lm_head.weight")[0].nbytes
    assert weights.head is not None and size <= taken < 1.1 * size
    assert peak - taken < 0.25 * size  # one weight, not a layer of each
