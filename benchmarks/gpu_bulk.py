"""A job's worth of prompts: tokens per second of hpcinfer and of transformers' `generate`, in turns."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from statistics import median
from typing import Any

import gpu_peer
import torch
from gpu_bench import Bench, Energy, Row, energy, log
from gpu_decode import random_prompts
from gpu_engine import Model, Way, greedy
from gpu_weights import RandomSource

from hpcinfer.config import EngineOptions

_PEER = "transformers"


def run(bench: Bench) -> Iterator[Row]:
    """Give a row for transformers and one for each way; those of the first way take turns with transformers'."""
    peer, failed = bench.obtain(_about(bench, _PEER), _Peer, bench)
    yield from failed
    for way in (Way(), Way(reproducible=False)):
        turns, about = _Turns(bench), _about(bench, _name(way))
        yield bench.attempt(about, _measure, bench, way, peer, turns)
        if peer is not None:
            yield {**_about(bench, _PEER), **peer.facts, **turns.row(_PEER, bench.sizes.bulk.peer_prompts)}
            peer = None  # it has had its rounds, and its memory is needed


def _name(way: Way) -> str:
    return "hpcinfer, reproducible" if way.reproducible else "hpcinfer"


def _about(bench: Bench, engine: str) -> Row:
    sizes = bench.sizes.bulk
    return {"shape": next(iter(bench.sizes.shapes)), "precision": "bf16", "engine": engine,
            "prompt_tokens": sizes.prompt_tokens, "output_tokens": sizes.output_tokens}  # fmt: skip


class _Turns:
    """Seconds and joules of contenders, round by round."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._seconds: dict[str, list[float]] = {}
        self._energy: dict[str, list[Energy]] = {}

    def take(self, name: str, work: Callable[[], object]) -> None:
        """Let one of them run."""
        with energy(self._bench.device) as spent:
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        self._seconds.setdefault(name, []).append(seconds)
        self._energy.setdefault(name, []).append(spent)
        log(f"bulk, {name}: {seconds:.2f} s")

    def row(self, name: str, prompts: int) -> Row:
        """What came of one of them, which has run so many prompts in each round."""
        if name not in self._seconds:
            return {"skipped": "it had no turn"}
        sizes, seconds = self._bench.sizes.bulk, self._seconds[name]
        outputs = prompts * sizes.output_tokens
        joules = [each.joules / outputs for each in self._energy[name] if each.joules is not None]
        return {
            "prompts": prompts, "seconds": seconds, "output_tokens_per_s": outputs / median(seconds),
            "total_tokens_per_s": (outputs + prompts * sizes.prompt_tokens) / median(seconds),
            "joules_per_token": median(joules) if joules else None,
        }  # fmt: skip


def _measure(bench: Bench, way: Way, peer: "_Peer | None", turns: _Turns) -> Row:
    """Run the rounds of one way, with transformers between them."""
    sizes = bench.sizes.bulk
    max_len = sizes.prompt_tokens + sizes.output_tokens
    shape = next(iter(bench.sizes.shapes.values()))
    model = Model(RandomSource(shape, "bf16", max_len), way, max_len)
    prompts = random_prompts(shape.vocab_size, sizes.prompts, sizes.prompt_tokens)
    limits = EngineOptions(max_num_seqs=sizes.max_num_seqs, max_num_batched_tokens=sizes.batched_tokens,
                           prefix_reuse=False)  # fmt: skip
    with closing(model.replica(limits)) as replica:
        model.generate(replica, prompts[: sizes.max_num_seqs], greedy(sizes.output_tokens))
        for number in range(bench.rounds):
            if number and bench.is_over:
                break
            bench.free_memory()
            if peer is not None:
                turns.take(_PEER, lambda: peer.run(prompts[: sizes.peer_prompts]))
            turns.take(_name(way), lambda: model.generate(replica, prompts, greedy(sizes.output_tokens)))
    return turns.row(_name(way), sizes.prompts)


class _Peer:
    """transformers with the batch that suits it best."""

    def __init__(self, bench: Bench) -> None:
        sizes, shape = bench.sizes.bulk, next(iter(bench.sizes.shapes.values()))
        self._runner, self._output_tokens, self._bench = gpu_peer.runner(), sizes.output_tokens, bench
        self._model = gpu_peer.make_random(shape, sizes.prompt_tokens + sizes.output_tokens, bench.device)
        prompts = random_prompts(shape.vocab_size, max(sizes.peer_batches), sizes.prompt_tokens)
        self._generate([prompts[0][::-1]])
        self._rates: dict[int, float] = {}
        for batch in sizes.peer_batches:
            try:
                self._rates[batch] = self._rate(prompts[:batch])
            except torch.OutOfMemoryError:
                break
            finally:
                bench.free_memory()
        self._batch = max(self._rates, key=self._rates.__getitem__)

    @property
    def facts(self) -> Row:
        """How it runs."""
        return {"batch": self._batch, "tokens_per_s_by_batch": self._rates}

    def run(self, prompts: Any) -> None:
        """Generate for all prompts."""
        for start in range(0, len(prompts), self._batch):
            self._generate(prompts[start : start + self._batch])

    def _rate(self, prompts: list[list[int]]) -> float:
        start = time.perf_counter()
        self._generate(prompts)
        rate = len(prompts) * self._output_tokens / (time.perf_counter() - start)
        log(f"bulk, transformers, batch {len(prompts)}: {rate:.0f} output tokens/s")
        return rate

    def _generate(self, prompts: list[list[int]]) -> None:
        with torch.inference_mode():
            outputs = self._runner.generate(self._model, prompts, self._output_tokens)
        assert {len(output) for output in outputs} == {self._output_tokens}, f"{outputs = }"
