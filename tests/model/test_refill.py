"""A rank that gets another place takes weights from memory, from others or from the store: always the same ones."""

from math import inf

import numpy as np
import pytest
from models import FAMILIES, make_tiny_model
from stages import MemoryStore, native_was_built

from hpcinfer.dtypes import to_float32
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import Weight
from hpcinfer.model import refill
from hpcinfer.model.refill import HeldWeights, Rate, Refill, held_units
from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_stage
from hpcinfer.partition.mesh import Coord, Mesh

NAME = "layers.0.up_proj.weight"
OPTIONS = LoadOptions(max_len=32)

native = pytest.mark.skipif(not native_was_built(), reason="the native kernels were not built")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return MemoryStore(make_tiny_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=2))


class Holder:
    """Holds some units, which it gives at a rate, filled with its number; or says no."""

    source = "sister"

    def __init__(self, number, units, bytes_per_s, *, refuses=False):
        self.number, self.units, self.bytes_per_s, self.refuses = number, units, bytes_per_s, refuses

    def held(self, name):
        return self.units

    def fetch(self, name, units):
        assert all(unit in self.units for unit in units)
        return None if self.refuses else Weight(np.full((len(units), 64, 64), self.number, np.float32), "float32")


def origins(store, *holders):
    """Who gives each of the eight units, after the store has been read: its number, or s for the store."""
    source = Refill(store, holders)
    source.read_weight("lm_head.weight", range(8))
    values = source.read_weight(NAME, range(8))[0]
    return "".join("s" if np.ptp(unit) else str(int(unit[0, 0])) for unit in values)


@pytest.mark.parametrize("rate, expected", [(inf, "ss111sss"), (1.0, "ssssssss"), (0.0, "ssssssss")])
def test_the_faster_source_is_asked(store, rate, expected):
    assert origins(store, Holder(1, range(2, 5), rate)) == expected


def test_a_slow_store_is_asked_for_the_rest(store, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(refill.time, "monotonic", lambda: 1000.0 * next(seconds))
    assert origins(store, Holder(1, range(2, 5), 1e6), Holder(2, range(4, 8), 2e6)) == "ss112222"
    assert origins(store, Holder(1, range(2, 5), 1e6, refuses=True)) == "ssssssss"


def test_an_unknown_store_is_read_first(store):
    source = Refill(store, [Holder(1, range(8), 1e15)])
    assert source.read_weight(NAME, range(8))[0].any()
    assert source.num_bytes == {"own": 0, "sister": 0, "store": 4 * 8 * 64 * 64}


def test_a_rate_is_bytes_over_seconds():
    rate = Rate()
    assert rate.per_s(7.0) == 7.0
    rate.add(100, 2.0)
    rate.add(200, 1.0)
    assert rate.per_s(7.0) == 100.0


@native
@pytest.mark.parametrize("before, after", [("1 2", "1 1"), ("2 1", "1 1"), ("1 3", "1 2"), ("1 1", "2 1")])
@pytest.mark.parametrize("family, is_tied", [(FAMILIES[0], False), ("qwen2", True)])
def test_a_refilled_rank_holds_what_the_store_has(tmp_path, family, is_tied, before, after):
    store = MemoryStore(make_tiny_model(tmp_path, family, num_hidden_layers=2, tie_word_embeddings=is_tied))
    kernels, held = create_kernels("native"), {}
    for key, mesh in (("before", before), ("after", after)):
        pp, tp = map(int, mesh.split())
        plan = shard_plan(store.config, store.grains, Mesh(1, pp, tp), Coord(0, pp - 1, tp - 1))
        source = Refill(store, [held["before"]] if key == "after" else [])
        store.reads.clear()
        held[key] = HeldWeights(store.config, kernels, plan, load_stage(source, kernels, plan, OPTIONS))
    assert source.num_bytes["own"] > 0
    read_twice = [name for name, units in store.reads if units is not None and "weight" in name
                  for unit in units if unit in held_units(store.config, held["before"].plan, name)]  # fmt: skip
    assert not read_twice
    names = [name for name in store._values if "proj" in name or "embed" in name or "lm_head" in name]
    for name in (name for name in names if name.endswith("weight")):
        units = held_units(store.config, plan, name)
        if len(units):
            found, (expected, dtype, _) = held["after"].fetch(name, units), store.read_weight(name, units)
            assert (to_float32(found.values, found.dtype) == to_float32(expected, dtype)).all(), name
