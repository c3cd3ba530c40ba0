"""Prefill: operations per second of prompts that get one token each, linear layers and causal attention counted."""

from collections.abc import Iterator
from contextlib import closing
from statistics import median

from gpu_bench import Bench, Row
from gpu_decode import Served, random_prompts
from gpu_engine import Model, Way, greedy
from gpu_sizes import PrefillSizes
from gpu_weights import RandomSource
from random_model import Shape

from hpcinfer.config import EngineOptions


def run(bench: Bench) -> Iterator[Row]:
    """Give a row for each precision of the first shape, way and length of prompts."""
    name, shape = next(iter(bench.sizes.shapes.items()))
    for precision in bench.precisions:
        for way in (Way(), Way(reproducible=False)):
            about = {"shape": name, "precision": precision, **way._asdict()}
            yield from _lengths(bench, about, shape, way)


def _lengths(bench: Bench, about: Row, shape: Shape, way: Way) -> Iterator[Row]:
    """One loaded model, length by length; a row that says why, if there is none."""
    served, failed = bench.obtain(about, _serve, bench.sizes.prefill, shape, about["precision"], way)
    yield from failed
    if served is not None:
        with closing(served.replica):
            for length in bench.sizes.prefill.lengths:
                yield bench.attempt({**about, "length": length}, _measure, bench, served, length)


def _serve(sizes: PrefillSizes, shape: Shape, precision: str, way: Way) -> Served:
    max_len, count = max(sizes.lengths) + 1, sizes.total_tokens // min(sizes.lengths)
    model = Model(RandomSource(shape, precision, max_len), way, max_len)
    limits = EngineOptions(max_num_seqs=count, max_num_batched_tokens=sizes.batched_tokens, prefix_reuse=False)
    return Served(model, model.replica(limits))


def _measure(bench: Bench, served: Served, length: int) -> Row:
    (model, replica), source = served, served.model.source
    assert isinstance(source, RandomSource)
    count = bench.sizes.prefill.total_tokens // length
    prompts = random_prompts(source.config.vocab_size, count, length)
    model.generate(replica, prompts[:1], greedy(1))
    seconds = [model.generate(replica, prompts, greedy(1)).seconds for _ in range(bench.rounds)]
    operations = source.operations(count * length, count) + count * source.attention_operations(length)
    return {"prompts": count, "seconds": seconds, "tokens_per_s": count * length / median(seconds),
            "operations_per_s": operations / median(seconds)}  # fmt: skip
