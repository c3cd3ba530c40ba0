"""The mesh: the (dp, pp, tp) grid of ranks. tp is innermost, so that its ranks are neighbours."""

from dataclasses import dataclass
from typing import NamedTuple

from hpcinfer.errors import MeshError
from hpcinfer.partition.split import split


class Coord(NamedTuple):
    """A rank's place in the mesh."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the grid of ranks."""

    dp: int  # replicas
    pp: int  # stages of a replica
    tp: int  # ranks of a stage

    @property
    def world_size(self) -> int:
        """Ranks of the whole mesh."""
        return self.dp * self.pp * self.tp

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.tp

    def coord(self, rank: int) -> Coord:
        """Place of a rank: tp varies fastest, dp slowest."""
        return Coord(rank // self.replica_size, rank // self.tp % self.pp, rank % self.tp)

    def rank(self, coord: Coord) -> int:
        """Inverse of `coord`."""
        return (coord.dp * self.pp + coord.pp) * self.tp + coord.tp

    def __str__(self) -> str:
        return f"dp={self.dp} pp={self.pp} tp={self.tp}"


def resolve_mesh(world_size: int, tp: int, pp: int, dp: int | None) -> Mesh:
    """Build the mesh of a world; dp is the rest of the world when it is None.

    Raises:
        MeshError: a size below 1, or dp * pp * tp differs from the world size.
    """
    for name, size in (("tensor", tp), ("pipeline", pp), ("data", 1 if dp is None else dp)):
        if size < 1:
            raise MeshError(f"{name}_parallel_size={size}", expected="a size of at least 1")
    mesh = Mesh(dp if dp is not None else max(1, world_size // (pp * tp)), pp, tp)
    if mesh.world_size != world_size:
        raise MeshError(
            f"dp({mesh.dp}) * pp({pp}) * tp({tp}) = {mesh.world_size} != world size ({world_size})",
            expected="as many ranks as the mesh has places",
            hint=f"start {mesh.world_size} ranks (mpirun -n {mesh.world_size}), or change -dp, -pp, -tp",
        )
    return mesh


def stage_layers(num_layers: int, pipeline_parallel_size: int) -> list[range]:
    """Layers of each stage.

    Raises:
        MeshError: more stages than layers.
    """
    if pipeline_parallel_size > num_layers:
        raise MeshError(
            f"pipeline_parallel_size={pipeline_parallel_size} asks for more stages than the model has layers"
            f" ({num_layers})",
            expected=f"pipeline_parallel_size between 1 and {num_layers}",
        )
    return split(num_layers, pipeline_parallel_size)
