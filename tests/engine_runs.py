"""Runs of the engine on a tiny model, for its tests: requests of all kinds, and what a replica makes of them."""

import dataclasses
import threading
from collections import Counter

import numpy as np
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions, SamplingParams
from hpcinfer.engine.frontend import ListFrontend
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import build_replica
from hpcinfer.engine.request import Request
from hpcinfer.kernels import create_kernels
from hpcinfer.partition.mesh import Mesh

MAX_LEN, SEED = 80, 3
KINDS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "n": 2},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 17, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.4, "min_tokens": 6, "logprobs": 0},
    {"temperature": 0.0, "echo": True, "logprobs": 1, "max_tokens": 0},
    {"temperature": 1.3, "frequency_penalty": 0.5, "echo": True, "logprobs": 3, "n": 2},
)  # fmt: skip


def make_requests(count=12):
    """Prompts of 1 to 50 tokens, some with a common beginning, each kind of sampling."""
    rng = np.random.default_rng(1)
    stem = tuple(int(i) for i in rng.integers(4, 390, 40))
    requests = []
    for row in range(count):
        own = tuple(int(i) for i in rng.integers(4, 390, rng.integers(1, 25)))
        params = SamplingParams(**{"max_tokens": int(rng.integers(4, 14)), **KINDS[row % len(KINDS)]})
        requests.append(Request(row, stem[: 17 * (row % 3)] + own, params))
    return requests


REQUESTS = make_requests()


class StoppingFrontend(ListFrontend):
    """Stops after so many looks at it."""

    def __init__(self, requests, num_looks):
        super().__init__(requests)
        self.num_looks = num_looks

    def is_stopping(self):
        self.num_looks -= 1
        return self.num_looks < 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What an engine made of the requests."""

    finished: dict
    counts: Counter
    peaks: dict


def block_bytes(store, block_size):
    config = store.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * 4 * block_size


def make_replica(store, group=None, mesh=Mesh(1, 1, 1), kernels=None, **limits):  # noqa: B008
    """This rank's part of a replica."""
    options = ReplicaOptions(EngineOptions(**limits), "float32", MAX_LEN, SEED)
    return build_replica(group or SerialGroup(), mesh, store, kernels or create_kernels("reference"), options)


def lead(replica, tokenizer, frontend):
    """Run the loop to its end, on rank 0 as the leader."""
    outputs = Outputs(tokenizer, replica.runner.eos_ids)
    replica.engine.run(Leader(replica.scheduler, outputs, frontend, replica.runner) if replica.is_leader else None)


def run_engine(store, tokenizer, requests=REQUESTS, *, num_blocks=None, group=None, mesh=Mesh(1, 1, 1), **limits):  # noqa: B008
    """Run requests to their end on this rank's part of a replica; rank 0 leads."""
    if num_blocks is not None:
        limits["kv_cache_memory"] = str(num_blocks * block_bytes(store, limits.get("block_size", 16)))
    replica = make_replica(store, group, mesh, **limits)
    frontend = ListFrontend(requests)
    lead(replica, tokenizer, frontend)
    metrics = replica.runner.metrics
    assert not replica.scheduler.num_live and replica.scheduler.blocks.num_free == replica.num_blocks
    return Run(frontend.finished, metrics.counts, metrics.peaks)


def run_mesh(store, tokenizer, tp, pp, in_flight, make_kernels=lambda: create_kernels("reference")):
    """Run requests on ranks that are threads; what each of them says."""
    lock = threading.Lock()

    class Guarded:
        """The store keeps one file open: one rank reads at a time."""

        config, grains = store.config, store.grains

        def read(self, name, units=None):
            with lock:
                return store.read(name, units)

        def read_weight(self, name, units=None):
            with lock:
                return store.read_weight(name, units)

    def rank_main(group):
        return run_engine(Guarded(), tokenizer, group=group, mesh=Mesh(1, pp, tp), max_num_seqs=4,
                          max_num_batched_tokens=32, micro_batches=in_flight, debug_lockstep=True,
                          kernels=make_kernels())  # fmt: skip

    ranks = run_ranks(tp * pp, rank_main)
    for failure in (rank for rank in ranks if isinstance(rank, Exception)):
        raise failure
    return ranks
