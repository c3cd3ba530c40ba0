"""Decoding by batch: tokens per second of steps in which every sequence gets one token, and what such a step reads.

A batch is what one step computes: with two batches in flight twice as many sequences take turns.
"""

from collections.abc import Iterator
from contextlib import closing
from statistics import median
from typing import NamedTuple

import numpy as np
from gpu_bench import Bench, Row, UnavailableError, energy
from gpu_engine import Generation, Model, Prompts, Way, greedy
from gpu_weights import RandomSource
from random_model import Shape

from hpcinfer.config import EngineOptions
from hpcinfer.engine.replica import Replica

_BATCHED_TOKENS = 8192  # of a step: prompts are computed in few


def run(bench: Bench) -> Iterator[Row]:
    """Give a row for each shape, precision, way and batch: all batches of bfloat16, a few of the others."""
    sizes = bench.sizes.decode
    main, *others = bench.sizes.shapes
    first, *precisions = bench.precisions
    yield from _ladder(bench, main, first, Way(), sizes.batches)
    yield from _ladder(bench, main, first, Way(reproducible=False), sizes.few)
    yield from _ladder(bench, main, first, Way(in_flight=1), sizes.few)
    for shape in others:
        yield from _ladder(bench, shape, first, Way(), sizes.batches)
    for precision in precisions:
        for way in (Way(), Way(reproducible=False)):
            yield from _ladder(bench, main, precision, way, sizes.few)
    yield from _ladder(bench, main, first, Way(graphs=False), sizes.few[:1])


def _ladder(bench: Bench, shape: str, precision: str, way: Way, batches: tuple[int, ...]) -> Iterator[Row]:
    """One loaded model, batch by batch; a row that says why, if there is none."""
    about = {"shape": shape, "precision": precision, **way._asdict()}
    served, failed = bench.obtain(about, serve, bench, bench.sizes.shapes[shape], precision, way, max(batches))
    yield from failed
    if served is not None:
        with closing(served.replica):
            for batch in batches:
                yield bench.attempt({**about, "batch": batch}, _measure, bench, served, batch)


class Served(NamedTuple):
    """A model, and a replica with room for the generations of this part."""

    model: Model
    replica: Replica


def serve(bench: Bench, shape: Shape, precision: str, way: Way, batch: int) -> Served:
    """Load a model of random weights, for batches up to a size; nothing is computed once instead of twice."""
    sizes = bench.sizes.decode
    max_len = sizes.prompt_tokens + sizes.output_tokens
    model = Model(RandomSource(shape, precision, max_len), way, max_len)
    limits = EngineOptions(max_num_seqs=batch, max_num_batched_tokens=_BATCHED_TOKENS, prefix_reuse=False,
                           micro_batches=way.in_flight)  # fmt: skip
    return Served(model, model.replica(limits))


def random_prompts(vocab_size: int, count: int, length: int) -> Prompts:
    """Prompts that share nothing."""
    ids: Prompts = np.random.default_rng(count).integers(0, vocab_size, (count, length)).tolist()
    return ids


def _measure(bench: Bench, served: Served, batch: int) -> Row:
    sizes, (model, replica), found = bench.sizes.decode, served, list[Generation]()
    prompts = random_prompts(model.source.config.vocab_size, batch, sizes.prompt_tokens)
    model.generate(replica, prompts, greedy(sizes.output_tokens))
    with energy(bench.device) as spent:
        for _ in range(bench.rounds):
            found.append(model.generate(replica, prompts, greedy(sizes.output_tokens)))
    return {**_steps(model, found, batch), "joules_per_token": _per_token(spent.joules, found)}


def _steps(model: Model, found: list[Generation], batch: int) -> Row:
    windows = [each.window for each in found if each.window is not None]
    if not windows:
        raise UnavailableError("no two steps of all sequences: the KV cache does not hold them at a time")
    rate, context = median(each.tokens_per_s for each in windows), windows[0].context
    assert isinstance(model.source, RandomSource)
    return {
        "output_tokens_per_s": rate,
        "by_round": [each.tokens_per_s for each in windows],
        "step_s": batch / rate,
        "step_bytes": model.source.step_bytes + batch * context * model.kv_bytes,
        "step_operations": model.source.operations(batch, batch),
        "context": context,
    }


def _per_token(joules: float | None, found: list[Generation]) -> float | None:
    """Joules for each output token, prefill included."""
    return joules / sum(len(choice.token_ids) for each in found for choice in each.choices) if joules else None
