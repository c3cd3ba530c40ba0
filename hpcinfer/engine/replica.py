"""One rank's part of a replica, built: groups, weights, KV cache, scheduler, loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from hpcinfer.agree import on_all, settle
from hpcinfer.comm.world import end_all
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.engine import Engine
from hpcinfer.engine.groups import Groups, open_groups
from hpcinfer.engine.kv_memory import cache_block_bytes, choose_num_blocks, make_cache
from hpcinfer.engine.largest_step import cache_for, largest_step, take_step
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.engine.pipeline import Pipeline, Place
from hpcinfer.engine.runner import Runner
from hpcinfer.engine.sampler import Sampler
from hpcinfer.engine.scheduler import Limits, Scheduler
from hpcinfer.errors import ConfigError, RankFailedError
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.decoder import CacheShape, Stage
from hpcinfer.model.shard import ShardPlan, shard_plan
from hpcinfer.model.weights_of import LoadOptions, StageWeights, WeightSource, load_stage
from hpcinfer.partition.mesh import Mesh

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """What the leader and the report need of it."""

    engine: Engine
    scheduler: Scheduler
    runner: Runner
    kernels: Kernels
    kv_cache_bytes: int  # of this rank
    num_blocks: int
    groups: Groups

    @property
    def is_leader(self) -> bool:
        """Whether this rank leads the replica."""
        return self.runner.pipeline.place.is_leader

    def close(self) -> None:
        """Let go of messages and shared memory: the replica is over for this rank, as after a death. Not collective."""
        self.groups.close()
        self.kernels.while_waiting = None


def build_replica(
    replica: Collectives, mesh: Mesh, store: WeightSource, kernels: Kernels, options: ReplicaOptions,
    load: Callable[[ShardPlan, LoadOptions], StageWeights] | None = None, on_loaded: Callable[[], None] | None = None,
) -> Replica:  # fmt: skip
    """Load this rank's weights, or let them come, and build its part of the loop.

    Collective over the replica; fails on all of its ranks or on none, or ends all.

    Args:
        replica: the ranks of one replica, stage by stage, tp innermost.
        mesh: of the replica; its dp does not matter.
        store: where weights are read.
        kernels: which compute.
        options: all else.
        load: gives the weights, which may arrive while they are used; None reads all of them in the store now.
        on_loaded: called when weights are there, or known to come: others may be let go.

    Raises:
        StoreError: a damaged store; of weights that arrive, when they are used.
        ConfigError: too little memory for one sequence of max_model_len, or none where the KV cache was to be.
    """
    coord, config = mesh.coord(replica.rank), store.config
    plan = shard_plan(config, store.grains, mesh, coord)
    loading = LoadOptions(options.dtype, options.max_model_len)
    read = partial(load, plan, loading) if load else partial(load_stage, store, kernels, plan, loading)
    weights = on_all(replica, lambda: _loaded(read))
    if kernels.free_bytes() is not None:
        on_all(replica, lambda: _loaded(lambda: weights.head))  # the last to come: all go before the KV cache
    if on_loaded is not None:
        on_loaded()
    kernels.trim()
    limits = _limits(options, mesh, kernels)
    hidden_shape = (limits.max_num_batched_tokens, config.hidden_size)
    groups = open_groups(replica, mesh, store.grains, kernels, options.selector, hidden_shape)
    kernels.while_waiting = groups.check
    try:
        stage = Stage(config, plan, weights, kernels, groups.reducer, cache=[])
        return _assemble(replica, mesh, stage, kernels, groups, limits, options)
    except BaseException:
        groups.close()
        kernels.while_waiting = None
        raise


def _loaded(read: Callable[[], T]) -> T:
    try:
        return read()
    except MemoryError as error:
        raise ConfigError(
            f"no memory for the weights of a rank ({error or 'allocation failed'})", expected="room for all of them",
            hint="spread the model over more ranks (-tp, -pp), or quantise it (hpcinfer convert --quantize)",
        ) from error


def _assemble(
    replica: Collectives, mesh: Mesh, stage: Stage, kernels: Kernels, groups: Groups, limits: Limits,
    options: ReplicaOptions,
) -> Replica:  # fmt: skip
    """Size the KV cache and build what is around a stage. Collective over the replica."""
    coord, config, metrics = mesh.coord(replica.rank), stage.config, options.metrics
    if kernels.free_bytes() is not None:
        _reserve(replica, stage, kernels, options)
    shape = CacheShape(0, options.engine.block_size, options.cache_dtype)
    block_bytes = cache_block_bytes(kernels, config, stage.plan, shape)
    num_blocks = choose_num_blocks(
        replica, kernels, block_bytes, options, limits.num_micro_batches, stage.weights.bytes_to_come
    )
    shape = shape._replace(num_blocks=num_blocks)
    stage.cache = on_all(replica, lambda: make_cache(kernels, config, stage.plan, shape))
    sampler = Sampler(
        kernels, groups.stage, config.vocab_size, stage.plan.num_grains, options.seed, groups.stage_arrays,
        keeps_ids=limits.goes_ahead,
    )  # fmt: skip
    place = Place(mesh.pp, mesh.tp, coord.pp, coord.tp)
    pipeline = Pipeline(groups.replica, place, limits.max_num_batched_tokens,
                        lambda tokens: kernels.empty((tokens, config.hidden_size)), groups.replica_arrays)  # fmt: skip
    for each in (groups.stage, groups.replica):
        each.watch(pipeline.is_busy)
    runner = Runner(stage, sampler, pipeline, config.eos_token_ids, metrics)
    blocks = BlockManager(num_blocks, options.engine.block_size, reuse=options.engine.prefix_reuse)
    scheduler = Scheduler(limits, blocks, metrics)
    engine = Engine(scheduler, runner, metrics, debug_lockstep=options.engine.debug_lockstep)
    return Replica(engine, scheduler, runner, kernels, num_blocks * block_bytes, num_blocks, groups)


def _reserve(replica: Collectives, stage: Stage, kernels: Kernels, options: ReplicaOptions) -> None:
    """Have a device set aside what the largest batch takes.

    Collective over the replica. A rank that fails in the middle of sums ends all, since others wait for it.
    """
    step = largest_step(options.engine, options.max_model_len)
    cache = on_all(replica, lambda: make_cache(kernels, stage.config, stage.plan, cache_for(step, options)))
    try:
        take_step(stage, kernels, step, cache)
    except RankFailedError:
        raise
    except Exception as error:
        if replica.size > 1:
            end_all(replica, error)
        raise


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


def needed_bytes(store: WeightSource, mesh: Mesh, options: ReplicaOptions, bytes_per_value: int) -> int:
    """Estimate the bytes that each rank of a replica needs: weights, and the KV cache of one sequence.

    Not collective.
    """
    config, layers = store.config, store.config.num_layers
    attention = config.hidden_size * config.head_size * 2 * (config.num_heads + config.num_kv_heads)
    weights = layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    weights += 2 * config.vocab_size * config.hidden_size
    cache = 2 * layers * config.num_kv_heads * config.head_size * options.max_model_len
    return bytes_per_value * (weights + cache) // mesh.replica_size


def _limits(options: ReplicaOptions, mesh: Mesh, kernels: Kernels) -> Limits:
    """What bounds a batch.

    A GPU is given the next batch before it is known what has become of the last one. One that is a replica by itself
    keeps the ids that it samples, so that the same sequences may be in both. Ranks that share a replica would have to
    tell each other these ids: they are given another batch where there are more sequences than one takes, since fewer
    would only have the weights read once more.
    """
    engine, on_gpu = options.engine, kernels.free_bytes() is not None
    num_batches = engine.micro_batches or mesh.pp + on_gpu
    has_room = engine.max_num_batched_tokens <= kernels.num_kept_ids
    goes_ahead = has_room and mesh.replica_size == 1 and num_batches == 2
    num_shares = num_batches if engine.micro_batches and not goes_ahead else mesh.pp
    return Limits(engine.max_num_seqs, engine.max_num_batched_tokens, num_batches, num_shares, goes_ahead)
