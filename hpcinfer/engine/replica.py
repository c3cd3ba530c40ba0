"""One rank's part of a replica, built: groups, weights, KV cache, scheduler, loop."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from hpcinfer.agree import on_all, settle
from hpcinfer.comm.launcher import read_launch
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.operations import Operations
from hpcinfer.comm.selector import Selector
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.config import EngineOptions, ModelConfig
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.engine import Engine
from hpcinfer.engine.pipeline import Pipeline, Place
from hpcinfer.engine.runner import Runner
from hpcinfer.engine.sampler import Sampler
from hpcinfer.engine.scheduler import Limits, Scheduler
from hpcinfer.errors import ConfigError, RankFailedError
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.decoder import CacheShape, Stage, allocate_cache
from hpcinfer.model.shard import ShardPlan, kv_bytes_per_token, shard_plan
from hpcinfer.model.weights_of import LoadOptions, StageWeights, WeightSource, load_stage
from hpcinfer.partition.grains import grain_runs, subtrees
from hpcinfer.partition.mesh import Mesh
from hpcinfer.report.metrics import Metrics
from hpcinfer.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

T = TypeVar("T")

_FREE_SHARE = 0.4  # of the node's free memory that KV caches take unless told otherwise


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica is built from besides the store."""

    engine: EngineOptions
    dtype: str  # of weights
    max_model_len: int  # tokens
    seed: int
    cache_dtype: str = "float32"  # of the KV cache
    selector: Selector = field(default_factory=Selector)  # of forms of sums, the same on all ranks
    metrics: Metrics = field(default_factory=Metrics)  # of this rank, whatever replicas it is built into


@dataclass(frozen=True)
class Replica:
    """What the leader and the report need of it."""

    engine: Engine
    scheduler: Scheduler
    runner: Runner
    kv_cache_bytes: int  # of this rank
    num_blocks: int
    operations: tuple[Operations, ...]  # of this rank's stage, and of all ranks: they share memory

    @property
    def is_leader(self) -> bool:
        """Whether this rank leads the replica."""
        return self.runner.pipeline.place.is_leader

    def close(self) -> None:
        """Let go of messages and shared memory: the replica is over for this rank, as after a death. Not collective."""
        self.runner.stage.reducer.close()
        for each in self.operations:
            each.close()


def check_engine_options(options: EngineOptions) -> None:
    """Check what needs no model. Not collective.

    Raises:
        ConfigError: a limit below 1, or a size that is none.
    """
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}", expected="at least 1")
    if options.micro_batches is not None and options.micro_batches < 1:
        raise ConfigError(f"--micro-batches {options.micro_batches}", expected="at least 1")
    if options.kv_cache_memory is not None:
        parse_bytes(options.kv_cache_memory)


def resolve_max_model_len(config: ModelConfig, wanted: int | None) -> int:
    """Resolve the tokens that prompt and output may have together.

    Raises:
        ConfigError: more than the model was made for.
    """
    if wanted is None:
        return config.max_position_embeddings
    if not 1 <= wanted <= config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {wanted}",
            expected=f"from 1 to {config.max_position_embeddings} (max_position_embeddings of the model)",
        )
    return wanted


def build_replica(
    replica: Collectives, mesh: Mesh, store: WeightSource, kernels: Kernels, options: ReplicaOptions,
    load: Callable[[ShardPlan, LoadOptions], StageWeights] | None = None,
) -> Replica:  # fmt: skip
    """Load this rank's weights, or let them come, and build its part of the loop.

    Collective over the replica; fails on all of its ranks or on none.

    Args:
        replica: the ranks of one replica, stage by stage, tp innermost.
        mesh: of the replica; its dp does not matter.
        store: where weights are read.
        kernels: which compute.
        options: all else.
        load: gives the weights, which may arrive while they are used; None reads all of them in the store now.

    Raises:
        StoreError: a damaged store; of weights that arrive, when they are used.
        ConfigError: too little memory for one sequence of max_model_len, or none where the KV cache was to be.
    """
    coord, config, metrics = mesh.coord(replica.rank), store.config, options.metrics
    tp_group = replica.split(coord.pp, replica.rank)
    plan = shard_plan(config, store.grains, mesh, coord)
    loading = LoadOptions(options.dtype, options.max_model_len)
    weights = on_all(replica, lambda: load(plan, loading) if load else load_stage(store, kernels, plan, loading))
    head_bytes = kernels.kv_bytes(config.head_size, options.cache_dtype)
    block_bytes = kv_bytes_per_token(config, plan, head_bytes) * options.engine.block_size
    free_bytes = _free_memory(replica, kernels, weights.bytes_to_come)
    mine = on_all(replica, lambda: _possible_blocks(block_bytes, mesh, options, free_bytes))
    num_blocks = min(int(count) for count in replica.all_gather_bytes(str(mine).encode()))
    on_all(replica, lambda: _check_blocks(num_blocks, block_bytes, options))
    shape = CacheShape(num_blocks, options.engine.block_size, options.cache_dtype)
    cache = on_all(replica, lambda: _make_cache(kernels, config, plan, shape, num_blocks * block_bytes))
    hidden_shape = (options.engine.max_num_batched_tokens, config.hidden_size)
    room_bytes = 4 * math.prod(hidden_shape) * max(len(subtrees(run)) for run in grain_runs(store.grains, mesh.tp))
    reducer = TreeReducer(tp_group, store.grains, kernels.empty, options.selector, room_bytes)
    stage = Stage(config, plan, weights, kernels, reducer, cache=cache)
    stage_ranks = Operations(tp_group, reducer.channel, options.selector)
    channel = reducer.channel if mesh.pp == 1 else open_channel(replica, is_for_messages=True)
    all_ranks = Operations(replica, channel, options.selector)
    sampler = Sampler(kernels, stage_ranks, config.vocab_size, store.grains, options.seed)
    place = Place(mesh.pp, mesh.tp, coord.pp, coord.tp)
    pipeline = Pipeline(all_ranks, place, hidden_shape[0], lambda tokens: kernels.empty((tokens, config.hidden_size)))
    operations = stage_ranks, all_ranks
    for each in operations:
        each.watch(pipeline.is_busy)
    runner = Runner(stage, sampler, pipeline, config.eos_token_ids, metrics)
    limits = Limits(options.engine.max_num_seqs, options.engine.max_num_batched_tokens, _micro_batches(options, mesh))
    blocks = BlockManager(num_blocks, options.engine.block_size, reuse=options.engine.prefix_reuse)
    scheduler = Scheduler(limits, blocks, metrics)
    engine = Engine(scheduler, runner, metrics, debug_lockstep=options.engine.debug_lockstep)
    return Replica(engine, scheduler, runner, num_blocks * block_bytes, num_blocks, operations)


def join_replica(world: Collectives, mesh: Mesh) -> Collectives:
    """Make the group of this rank's replica. Collective over the world."""
    return world.split(mesh.coord(world.rank).dp, world.rank)


def build_together(world: Collectives, build: Callable[[], T]) -> T:
    """Build this rank's part of its replica; if one replica cannot be built, all ranks fail.

    Collective over the world; `build` is collective over a part of it.
    """
    error: Exception | None = None
    try:
        replica = build()
    except RankFailedError:
        raise
    except Exception as caught:
        error = caught
    settle(world, error)
    return replica


def needed_bytes(store: WeightSource, mesh: Mesh, options: ReplicaOptions) -> int:
    """Estimate the bytes that each rank of a replica needs: weights, and the KV cache of one sequence.

    Not collective.
    """
    config, layers = store.config, store.config.num_layers
    attention = config.hidden_size * config.head_size * 2 * (config.num_heads + config.num_kv_heads)
    weights = layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    weights += 2 * config.vocab_size * config.hidden_size
    cache = 2 * layers * config.num_kv_heads * config.head_size * options.max_model_len
    return 4 * (weights + cache) // mesh.replica_size


def _micro_batches(options: ReplicaOptions, mesh: Mesh) -> int:
    """Batches in flight."""
    return options.engine.micro_batches or mesh.pp


def _possible_blocks(block_bytes: int, mesh: Mesh, options: ReplicaOptions, free: int) -> int:
    """Blocks that this rank can hold in so many bytes of free memory. Not collective."""
    engine = options.engine
    per_sequence = -(-options.max_model_len // engine.block_size)
    useful = per_sequence * engine.max_num_seqs * _micro_batches(options, mesh)
    if engine.kv_cache_memory is not None:
        wanted = parse_bytes(engine.kv_cache_memory)
        if wanted > free:
            raise ConfigError(
                f"--kv-cache-memory {engine.kv_cache_memory}, of {format_bytes(free)} free per rank",
                expected="no more than there is",
                hint="it counts for each rank; leave it out for a share of what is free",
            )
        return wanted // max(1, block_bytes)
    if block_bytes:
        return min(useful, int(_FREE_SHARE * free) // block_bytes)
    return useful


def _check_blocks(num_blocks: int, block_bytes: int, options: ReplicaOptions) -> None:
    needed = -(-options.max_model_len // options.engine.block_size)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache holds {num_blocks} blocks of {options.engine.block_size} tokens"
            f" ({format_bytes(num_blocks * block_bytes)} per rank)",
            expected=f"{needed} blocks for one sequence of max_model_len={options.max_model_len}:"
            f" {format_bytes(needed * block_bytes)} per rank",
            hint="raise --kv-cache-memory, lower --max-model-len, or spread the model over more ranks",
        )


def _make_cache(
    kernels: Kernels, config: ModelConfig, plan: ShardPlan, shape: CacheShape, size_bytes: int
) -> list[Any]:
    try:
        return allocate_cache(kernels, config, plan, shape)
    except MemoryError as error:
        raise ConfigError(
            f"no memory for a KV cache of {format_bytes(size_bytes)} per rank",
            expected="memory that is free, and that this process may have (ulimit -v, the job's limit)",
            hint="lower --kv-cache-memory, or give one if there is none",
        ) from error


def _free_memory(replica: Collectives, kernels: Kernels, bytes_to_come: int) -> int:
    """Bytes that this rank may count as free: of its device, or the same on all ranks of the replica on one node.

    Collective over the replica. The weights that are still to come to them are taken from what their node has left;
    ranks of other replicas on it are thought to be like them.
    """
    if (of_device := kernels.free_bytes()) is not None:
        return max(0, of_device - bytes_to_come)
    own = (int(psutil.virtual_memory().available), bytes_to_come, read_launch(os.environ).local_size)
    told = [json.loads(data) for data in replica.all_gather_bytes(json.dumps(own).encode())]
    where = replica.locations
    here = [told[rank] for rank in range(replica.size)
            if (where[rank].node == where[replica.rank].node if where else rank == replica.rank)]  # fmt: skip
    available, num_ranks = min(each[0] for each in here), max(1, *(each[2] for each in here))
    return max(0, available // num_ranks - sum(each[1] for each in here) // len(here))
