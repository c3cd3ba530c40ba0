"""The KV cache of a rank: how many blocks it may have, and their memory."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import psutil

from hpcinfer.agree import on_all
from hpcinfer.comm.launcher import read_launch
from hpcinfer.config import ModelConfig
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.errors import ConfigError
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.decoder import CacheShape, allocate_cache
from hpcinfer.model.shard import ShardPlan, kv_bytes_per_token
from hpcinfer.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_NODE_SHARE = 0.4  # of the node's free memory that KV caches take unless told otherwise
_DEVICE_SHARE = 0.9  # of a device's, which is there for this rank; recorded steps and samplers need the rest


def choose_num_blocks(
    replica: Collectives, kernels: Kernels, block_bytes: int, options: ReplicaOptions, num_batches: int,
    bytes_to_come: int,
) -> int:  # fmt: skip
    """Choose how many blocks every rank of a replica has.

    Collective over the replica; fails on all of its ranks or on none.

    Args:
        replica: its ranks.
        kernels: which hold the cache.
        block_bytes: of one block on this rank.
        options: of the replica.
        num_batches: in flight.
        bytes_to_come: of weights that are not there yet.

    Raises:
        ConfigError: too little memory for one sequence of max_model_len, or less than was asked for.
    """
    free, on_device = free_memory(replica, kernels, bytes_to_come), kernels.free_bytes() is not None
    share = int((_DEVICE_SHARE if on_device else _NODE_SHARE) * free)
    mine = on_all(replica, lambda: _possible_blocks(block_bytes, options, num_batches, free, share))
    num_blocks = min(int(count) for count in replica.all_gather_bytes(str(mine).encode()))
    on_all(replica, lambda: _check_blocks(num_blocks, block_bytes, options))
    return num_blocks


def make_cache(kernels: Kernels, config: ModelConfig, plan: ShardPlan, shape: CacheShape) -> list[Any]:
    """Allocate K and V of each layer of a rank's stage. Not collective.

    Raises:
        ConfigError: there is no such memory.
    """
    try:
        return allocate_cache(kernels, config, plan, shape)
    except MemoryError as error:
        num_bytes = shape.num_blocks * cache_block_bytes(kernels, config, plan, shape)
        raise ConfigError(
            f"no memory for a KV cache of {format_bytes(num_bytes)} per rank",
            expected="memory that is free, and that this process may have (ulimit -v, the job's limit)",
            hint="lower --kv-cache-memory, or give one if there is none",
        ) from error


def cache_block_bytes(kernels: Kernels, config: ModelConfig, plan: ShardPlan, shape: CacheShape) -> int:
    """Bytes of one KV block of a rank, all layers of its stage. Not collective."""
    return kv_bytes_per_token(config, plan, kernels.kv_bytes(config.head_size, shape.dtype)) * shape.block_size


def free_memory(replica: Collectives, kernels: Kernels, bytes_to_come: int) -> int:
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


def _possible_blocks(block_bytes: int, options: ReplicaOptions, num_batches: int, free: int, share: int) -> int:
    """Blocks that this rank can hold in so many bytes of free memory, or in its share of them if none were asked for.

    Not collective."""
    engine = options.engine
    useful = -(-options.max_model_len // engine.block_size) * engine.max_num_seqs * num_batches
    if engine.kv_cache_memory is not None:
        wanted = parse_bytes(engine.kv_cache_memory)
        if wanted > free:
            raise ConfigError(
                f"--kv-cache-memory {engine.kv_cache_memory}, of {format_bytes(free)} free per rank",
                expected="no more than there is",
                hint="it counts for each rank; leave it out for a share of what is free",
            )
        return wanted // max(1, block_bytes)
    return min(useful, share // block_bytes) if block_bytes else useful


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
