"""The points of a study: how many nodes and ranks, which mesh, how many rows. Starts nothing, reads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hpcinfer.errors import ConfigError, MeshError
from hpcinfer.partition.mesh import Mesh, resolve_mesh

STRONG, WEAK = "strong", "weak"
_SIZE = re.compile(r"(dp|pp|tp)=([1-9][0-9]*|node|nodes|all)")


class Shape(NamedTuple):
    """The ranks of a job."""

    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}"


class Recipe(NamedTuple):
    """How the mesh follows from the shape: a size is a number, or `node`, `nodes` or `all`."""

    pp: str = "1"
    tp: str = "1"
    dp: str = ""  # what is left

    def mesh(self, shape: Shape) -> Mesh:
        """Resolve the sizes.

        Raises:
            MeshError: the ranks do not form it.
        """
        words = {"node": shape.ranks_per_node, "nodes": shape.nodes, "all": shape.ranks}
        pp, tp, dp = (words[size] if size in words else int(size or 0) for size in self)
        return resolve_mesh(shape.ranks, tp, pp, dp or None)

    def __str__(self) -> str:
        usual = Recipe()._asdict()
        sizes = [f"{name}={size}" for name, size in self._asdict().items() if size != usual[name]]
        return ",".join(sizes) or "dp"


class Point(NamedTuple):
    """One measurement of a study: it is run several times."""

    scaling: str  # strong or weak
    shape: Shape
    recipe: Recipe
    rows: int

    def mesh(self) -> Mesh | None:
        """The mesh; None where there is none."""
        try:
            return self.recipe.mesh(self.shape)
        except MeshError:
            return None

    def problem(self) -> str:
        """Why there is no mesh; "" where there is one."""
        try:
            self.recipe.mesh(self.shape)
        except MeshError as error:
            return error.found
        return ""

    def run_name(self) -> str:
        """Name of what is run: points that differ in words alone share their runs."""
        mesh = self.mesh()
        sizes = f"dp{mesh.dp}-pp{mesh.pp}-tp{mesh.tp}" if mesh else str(self.recipe).replace("=", "").replace(",", "-")
        return f"{self.shape}-{sizes}-rows{self.rows}"


class Rows(NamedTuple):
    """How many rows points have."""

    strong: int  # each
    per_rank: int  # of weak ones

    def of(self, scaling: str, shape: Shape) -> int:
        """Rows of a point."""
        return self.strong if scaling == STRONG else self.per_rank * shape.ranks


def parse_recipe(text: str) -> Recipe:
    """Read a mesh as tp=2 or pp=nodes,tp=node; `dp` is replicas of one rank.

    Raises:
        ConfigError: not of this form.
    """
    found = [_SIZE.fullmatch(part.strip()) for part in text.split(",")] if text != "dp" else []
    sizes = {match[1]: match[2] for match in found if match}
    if len(sizes) < len(found):
        raise ConfigError(f"--mesh {text}", expected="sizes as tp=2 or pp=nodes,tp=node: numbers, node, nodes or all",
                          hint="dp=... fixes the replicas; --mesh dp is replicas of one rank")  # fmt: skip
    return Recipe(**sizes)


def parse_numbers(text: str, flag: str) -> list[int]:
    """Read 1,2,4 in ascending order.

    Raises:
        ConfigError: something else.
    """
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise ConfigError(f"{flag} {text}", expected="numbers of at least 1, as 1,2,4")
    return sorted(set(map(int, text.split(","))))


def parse_shape(text: str) -> Shape:
    """Read NODESxRANKS.

    Raises:
        ConfigError: not of this form.
    """
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not match:
        raise ConfigError(f"--only {text}", expected="nodes and ranks on each, as 4x2")
    return Shape(int(match[1]), int(match[2]))


def plan_rows(shapes: Iterable[Shape], wanted: int | None, available: int) -> Rows:
    """Say how many rows points have: the smallest one as many in both kinds of scaling, where ranks divide them.

    Args:
        shapes: of all points.
        wanted: rows of the smallest point; the input without repetition if None.
        available: rows of the input.
    """
    ranks = [shape.ranks for shape in shapes]
    strong = available if wanted is None else wanted
    per_rank = available // max(ranks) if wanted is None else -(-wanted // min(ranks))
    return Rows(strong, max(1, per_rank))


def plan_points(scalings: Sequence[str], shapes: Sequence[Shape], recipes: Sequence[Recipe], rows: Rows) -> list[Point]:
    """List all points, those that belong together one behind the other."""
    return [Point(scaling, shape, recipe, rows.of(scaling, shape))
            for scaling in scalings for recipe in recipes for shape in shapes]  # fmt: skip
