"""What one rank of a replica holds: layers, grains, heads, and the bytes of its KV cache. Integers only."""

from dataclasses import dataclass

from hpcinfer.config import ModelConfig
from hpcinfer.kernels.protocol import HeadLayout
from hpcinfer.partition.grains import grain_ranges, grain_runs
from hpcinfer.partition.heads import needed_kv_heads
from hpcinfer.partition.mesh import Coord, Mesh, stage_layers


@dataclass(frozen=True)
class ShardPlan:
    """The part of a model that one rank computes."""

    layers: range  # of its stage
    run: range  # grains of its tp coordinate
    num_grains: int  # of the store
    is_first: bool  # the stage that embeds
    is_last: bool  # the stage that makes logits


def shard_plan(config: ModelConfig, num_grains: int, mesh: Mesh, coord: Coord) -> ShardPlan:
    """Say what the rank at a place of the mesh holds.

    Raises:
        MeshError: more stages than layers, or more tp ranks than grains.
    """
    layers = stage_layers(config.num_layers, mesh.pp)[coord.pp]
    run = grain_runs(num_grains, mesh.tp)[coord.tp]
    return ShardPlan(layers, run, num_grains, coord.pp == 0, coord.pp == mesh.pp - 1)


def kv_heads(config: ModelConfig, plan: ShardPlan) -> range:
    """KV heads that the query heads of a rank read."""
    heads = grain_ranges(config.num_heads, plan.num_grains)[plan.run.start : plan.run.stop]
    return needed_kv_heads(config.num_heads, config.num_kv_heads, range(heads[0].start, heads[-1].stop))


def head_layout(config: ModelConfig, plan: ShardPlan) -> HeadLayout:
    """Heads of a rank, and where they stand in its grains."""
    heads = grain_ranges(config.num_heads, plan.num_grains)
    local = heads[plan.run.start : plan.run.stop]
    first_kv, group = kv_heads(config, plan).start, config.num_heads // config.num_kv_heads
    kv_of_head = tuple(head // group - first_kv for head in range(local[0].start, local[-1].stop))
    return HeadLayout(config.head_size, len(heads[0]), tuple(map(len, local)), kv_of_head)


def vocab_ranges(config: ModelConfig, plan: ShardPlan) -> list[range]:
    """Vocabulary ids of each grain of a rank."""
    return grain_ranges(config.vocab_size, plan.num_grains)[plan.run.start : plan.run.stop]


def kv_bytes_per_token(config: ModelConfig, plan: ShardPlan, bytes_per_head: int) -> int:
    """Bytes of KV cache that a token takes on this rank, by those of a head (`Kernels.kv_bytes`); 0 without heads."""
    return len(plan.layers) * len(kv_heads(config, plan)) * bytes_per_head
