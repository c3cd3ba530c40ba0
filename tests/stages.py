"""Whole replicas in one process for tests: tp ranks are threads, pp stages are chained."""

from pathlib import Path

import numpy as np
from steps import Chunk, block_tables, packed_step, schedule
from thread_group import run_ranks

from hpcinfer.comm.selector import Selector
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.kernels import Placement, create_kernels, reference
from hpcinfer.kernels.native import create_native_kernels
from hpcinfer.model.decoder import CacheShape, Stage, allocate_cache
from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_stage
from hpcinfer.partition.mesh import Coord, Mesh
from hpcinfer.weights.layout import read_units
from hpcinfer.weights.schema import param_specs
from hpcinfer.weights.source import Source


class MemoryStore:
    """A Hugging Face folder cut into grains, in memory; `reads` lists what was asked for."""

    def __init__(self, folder: Path, grains: int = 8) -> None:
        self.grains, self.reads = grains, []
        with Source(folder) as source:
            self.config = source.config
            specs = param_specs(source.config, grains)
            self._values = {spec.name: np.stack(list(read_units(source, spec, grains))) for spec in specs}
            self._dtype = source.dtype("model.norm.weight")

    def read(self, name, units=None):
        """Units of a parameter, and their dtype."""
        self.reads.append((name, units))
        values = self._values[name]
        return (values if units is None else values[units.start : units.stop]), self._dtype

    def read_weight(self, name, units=None):
        """The same of a weight, which is not quantised."""
        return (*self.read(name, units), None)


def native_was_built() -> bool:
    """Whether this installation has the native kernels."""
    return create_native_kernels(Placement()) is not None


def run_replica(
    store, token_ids, *, tp=1, pp=1, chunk=1000, company=1000, block_size=16, dtype="auto", cache="float32",
    kernels="reference", threads=1, overlap="auto",
):  # fmt: skip
    """Logits of every position of every sequence: a list of float32 [L, V]."""
    lengths = [len(ids) for ids in token_ids]
    tables, num_blocks = block_tables(lengths, block_size)
    batches = schedule(lengths, chunk, company) if chunk < 1000 else [[Chunk(s, 0, n) for s, n in enumerate(lengths)]]
    steps = [packed_step(chunks, token_ids, tables, block_size) for chunks in batches]
    shape = CacheShape(num_blocks, block_size, cache)

    def rank_main(group):
        sets = [create_kernels(kernels, placement=Placement(threads, None)) for _ in range(pp)]
        places = [Coord(0, i, group.rank) for i in range(pp)]
        stages = [
            make_stage(store, Mesh(1, pp, tp), place, group, shape, dtype=dtype, kernels=kernels, overlap=overlap)
            for place, kernels in zip(places, sets, strict=True)
        ]
        return [_forward(stages, step) for step in steps]

    ranks = run_ranks(tp, rank_main)
    failures = [result for result in ranks if isinstance(result, Exception)]
    if failures:
        raise failures[0]
    logits = [np.concatenate(parts, axis=1) for parts in zip(*ranks, strict=True)]
    return _by_sequence(batches, logits, lengths, store)


def make_stage(store, mesh, coord, group, shape, *, dtype="auto", kernels=None, overlap="auto"):
    """One rank's stage, its cache full of NaN."""
    kernels, plan = kernels or create_kernels("reference"), shard_plan(store.config, store.grains, mesh, coord)
    reducer = TreeReducer(group, store.grains, kernels.empty, Selector(overlap=overlap))
    weights = load_stage(store, kernels, plan, LoadOptions(dtype, max_len=512))
    cache = allocate_cache(kernels, store.config, plan, shape)
    for layer in cache:
        poison(layer, shape.num_blocks)
    return Stage(store.config, plan, weights, kernels, reducer, cache=cache)


def poison(cache, num_blocks):
    """Fill a cache with NaN."""
    if isinstance(cache, reference.Cache):
        cache.values[:, :num_blocks] = float("nan")
    else:
        cache.memory()[:] = 0xFF


def _forward(stages, step):
    hidden = None
    for stage in stages:
        hidden = stage.forward(step, hidden)
    return hidden


def _by_sequence(batches, logits, lengths, store):
    """Drop the padding of grains, and sort rows by sequence."""
    sizes = [len(ids) for ids in np.array_split(np.arange(store.config.vocab_size), store.grains)]
    results = [np.zeros((length, store.config.vocab_size), np.float32) for length in lengths]
    for chunks, rows in zip(batches, logits, strict=True):
        whole = np.concatenate([rows[:, grain, :size] for grain, size in enumerate(sizes)], axis=1)
        start = 0
        for c in chunks:
            results[c.sequence][c.start : c.stop] = whole[start : start + c.stop - c.start]
            start += c.stop - c.start
    return results
