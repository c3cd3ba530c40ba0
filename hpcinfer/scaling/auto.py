"""What `--auto` studies: powers of two of nodes, and the three meshes that one would try first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from hpcinfer.errors import HpcInferError, MeshError
from hpcinfer.partition.layout import ModelLimits
from hpcinfer.scaling.plan import Recipe, Shape

MOST_SIZES = 6  # numbers of nodes, or of ranks on the one node


class Room(NamedTuple):
    """What there is to run on."""

    nodes: int
    ranks_per_node: int


def choose_shapes(room: Room) -> list[Shape]:
    """Choose numbers of nodes; on a single node, of its ranks."""
    if room.nodes > 1:
        return [Shape(nodes, room.ranks_per_node) for nodes in _doublings(room.nodes)]
    return [Shape(1, ranks) for ranks in _doublings(room.ranks_per_node)]


def choose_recipes(shapes: list[Shape], limits: ModelLimits | None) -> list[Recipe]:
    """Choose meshes: replicas of a rank, tp within a node, stages across nodes; those that the model allows everywhere.

    Args:
        shapes: of all points.
        limits: of the model; None if they are not known.
    """
    tp = "node" if max(shape.ranks_per_node for shape in shapes) > 1 else "1"
    pp = "nodes" if max(shape.nodes for shape in shapes) > 1 else "1"
    recipes = dict.fromkeys([Recipe(), Recipe(tp=tp), Recipe(pp, tp)])
    return [recipe for recipe in recipes if all(_fits(recipe, shape, limits) for shape in shapes)]


def read_limits(model: str) -> ModelLimits | None:
    """Read what the model sets to a mesh; None where that cannot be said before a run."""
    from hpcinfer.weights.locate import find_model
    from hpcinfer.weights.reader import Store, is_store

    try:
        folder = find_model(model)
        if is_store(folder):
            with Store.open(folder) as store:
                return ModelLimits(store.config.num_layers, store.grains)
        return ModelLimits(json.loads(Path(folder, "config.json").read_text())["num_hidden_layers"], _USUAL_GRAINS)
    except (HpcInferError, OSError, ValueError, LookupError):
        return None


_USUAL_GRAINS = 8  # of a store that the first run will make


def _fits(recipe: Recipe, shape: Shape, limits: ModelLimits | None) -> bool:
    try:
        mesh = recipe.mesh(shape)
    except MeshError:
        return False
    return limits is None or (mesh.tp <= limits.grains and mesh.pp <= limits.num_layers)


def _doublings(most: int) -> list[int]:
    """Powers of two up to a number, and the number; when these are too many, the smallest and the larger ones."""
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    return counts if len(counts) <= MOST_SIZES else [counts[0], *counts[1 - MOST_SIZES :]]
