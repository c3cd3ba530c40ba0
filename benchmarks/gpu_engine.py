"""hpcinfer as the benchmark runs it: the engine's own loop in this process, fed from a list, and watched."""

import json
import time
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from typing import NamedTuple

from random_model import numbered_tokenizer

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions, SamplingParams
from hpcinfer.data.completion import Choice
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.engine.frontend import ListFrontend
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import Replica, ReplicaOptions, build_replica
from hpcinfer.engine.request import Request
from hpcinfer.kernels import GpuOptions, create_kernels
from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions, WeightSource, load_stage
from hpcinfer.partition.mesh import Mesh

_ALONE = Mesh(1, 1, 1)
Prompts = list[list[int]]


class Way(NamedTuple):
    """How the kernels compute."""

    dtype: str = "bfloat16"  # of products and of the KV cache
    reproducible: bool = True
    graphs: bool = True
    in_flight: int = 2  # batches: with two, the host prepares one while the device computes the other


class Window(NamedTuple):
    """The part of a generation in which every sequence decodes."""

    seconds: float
    tokens: int
    context: float  # tokens of a sequence, on average

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


class Generation(NamedTuple):
    """What came of some prompts."""

    choices: list[Choice]  # in the order of the prompts
    seconds: float
    window: Window | None  # None if it was shorter than two steps


class Model:
    """Weights on the device, and the kernels that use them; replicas of any limits stand on them.

    Args:
        source: of the weights.
        way: of the kernels.
        max_len: tokens of prompt and output together.
        tokenizer: of the model; one of numbers if not given.
    """

    def __init__(self, source: WeightSource, way: Way, max_len: int, tokenizer: Tokenizer | None = None) -> None:
        self.source, self.way, self.max_len = source, way, max_len
        self.tokenizer = tokenizer or made_up_tokenizer(source.config.vocab_size)
        options = GpuOptions(way.dtype, way.reproducible, way.graphs)
        self.kernels = create_kernels("auto", "cuda", gpu=options)
        self.load()

    def load(self) -> None:
        """Load the weights, again if they are there."""
        plan = shard_plan(self.source.config, self.source.grains, _ALONE, _ALONE.coord(0))
        self.weights = load_stage(self.source, self.kernels, plan, LoadOptions(self.way.dtype, self.max_len))

    def replica(self, limits: EngineOptions) -> Replica:
        """Build a replica with a KV cache of its own; `close` it before the next one."""
        options = ReplicaOptions(limits, self.way.dtype, self.max_len, seed=1, cache_dtype=self.way.dtype)
        weights = self.weights
        return build_replica(SerialGroup(), _ALONE, self.source, self.kernels, options, lambda plan, how: weights)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache of one token."""
        config = self.source.config
        return config.num_layers * config.num_kv_heads * self.kernels.kv_bytes(config.head_size, self.way.dtype)

    def generate(self, replica: Replica, prompts: Prompts, sampling: SamplingParams) -> Generation:
        """Run prompts through the engine's loop."""
        return self.generate_each(replica, prompts, (sampling,))

    def generate_each(self, replica: Replica, prompts: Prompts, samplings: Sequence[SamplingParams]) -> Generation:
        """Run prompts through the engine's loop, each sampled in its turn's way."""
        ways = cycle(samplings)
        requests = [Request(row, tuple(ids), next(ways)) for row, ids in enumerate(prompts)]
        frontend, watch = ListFrontend(requests), _Watch(replica, len(requests))
        leader = Leader(replica.scheduler, Outputs(self.tokenizer, ()), frontend, replica.runner)
        start = time.perf_counter()
        replica.engine.run(leader, watch.look)
        seconds = time.perf_counter() - start
        return Generation([frontend.finished[row][0] for row in range(len(requests))], seconds, watch.window())


def greedy(output_tokens: int) -> SamplingParams:
    """So many of the most likely tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)


@cache
def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer in which every id has a text."""
    return Tokenizer({"tokenizer.json": numbered_tokenizer(vocab_size).to_str().encode()})


class _Mark(NamedTuple):
    """A moment between two steps."""

    time: float
    tokens: int  # scheduled so far
    context: int  # tokens of all sequences


class _Watch:
    """Finds the window of a generation: from when all prompts are computed until the first sequence ends."""

    def __init__(self, replica: Replica, num_sequences: int) -> None:
        self._scheduler, self._counts = replica.scheduler, replica.runner.metrics.counts
        self._num_sequences = num_sequences
        self._first: _Mark | None = None
        self._last: _Mark | None = None

    def look(self) -> None:
        """Look at the engine between two steps."""
        running = self._scheduler.running
        if len(running) < self._num_sequences:
            return
        if self._first is not None:
            self._last = self._mark()
        elif all(each.num_computed >= each.num_prompt for each in running):
            self._first = self._mark()

    def window(self) -> Window | None:
        """What was seen."""
        first, last = self._first, self._last
        if first is None or last is None or last.tokens == first.tokens:
            return None
        context = (first.context + last.context) / 2 / self._num_sequences
        return Window(last.time - first.time, last.tokens - first.tokens, context)

    def _mark(self) -> _Mark:
        context = sum(len(each.token_ids) for each in self._scheduler.running)
        return _Mark(time.perf_counter(), self._counts["tokens"], context)


def digest_bytes(choices: Sequence[Choice]) -> bytes:
    """Everything that choices say: ids, texts, log-probabilities to the last bit."""
    return json.dumps([[each.token_ids, each.text, each.finish_reason, each.logprobs] for each in choices]).encode()
