"""Planning: the points cover what was asked, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.errors import ConfigError, MeshError
from hpcinfer.scaling.plan import (
    STRONG,
    WEAK,
    Recipe,
    Shape,
    parse_numbers,
    parse_recipe,
    parse_shape,
    plan_points,
    plan_rows,
)

sizes = st.integers(1, 12)
shapes = st.lists(st.builds(Shape, sizes, sizes), min_size=1, max_size=6, unique=True)
words = st.sampled_from(["1", "2", "3", "node", "nodes", "all"])
recipe = st.builds(Recipe, words, words, st.sampled_from(["", "1", "2"]))
recipes = st.lists(recipe, min_size=1, max_size=4, unique=True)


@given(shapes, recipes, st.integers(1, 500) | st.none(), st.integers(1, 500))
def test_points_cover_what_was_asked(shapes, recipes, wanted, available):
    rows = plan_rows(shapes, wanted, available)
    points = plan_points([STRONG, WEAK], shapes, recipes, rows)
    asked = {(scaling, shape, recipe) for scaling in (STRONG, WEAK) for shape in shapes for recipe in recipes}
    assert len(points) == len(asked) and {point[:3] for point in points} == asked
    for point in points:
        assert point.rows == (rows.strong if point.scaling == STRONG else rows.per_rank * point.shape.ranks)
        mesh = point.mesh()
        assert bool(point.problem()) == (mesh is None)
        assert mesh is None or mesh.world_size == point.shape.ranks


@given(shapes, st.integers(1, 500) | st.none(), st.integers(1, 500))
def test_weak_points_have_as_many_rows_for_each_rank(shapes, wanted, available):
    rows, ranks = plan_rows(shapes, wanted, available), [shape.ranks for shape in shapes]
    assert rows.per_rank >= 1
    if wanted is None and available >= max(ranks):
        assert rows.per_rank * max(ranks) <= available  # no row comes again
    if wanted is not None:
        assert wanted <= rows.per_rank * min(ranks) < wanted + min(ranks)


@given(shapes, recipes)
def test_runs_are_shared_exactly_where_the_job_is_the_same(shapes, recipes):
    points = plan_points([STRONG, WEAK], shapes, recipes, plan_rows(shapes, 8, 8))
    names: dict[str, object] = {}
    for point in points:
        job = (point.shape, point.mesh() or point.recipe, point.rows)
        assert names.setdefault(point.run_name(), job) == job
    assert len(set(names.values())) == len(names)


@given(recipes)
def test_recipes_are_read_as_they_are_shown(recipes):
    for recipe in recipes:
        assert parse_recipe(str(recipe)) == recipe


def test_words_of_a_recipe_follow_the_shape():
    mesh = parse_recipe("pp=nodes,tp=node").mesh(Shape(3, 4))
    assert (mesh.dp, mesh.pp, mesh.tp) == (1, 3, 4)
    assert parse_recipe("tp=2").mesh(Shape(3, 4)).dp == 6
    assert parse_recipe("tp=all").mesh(Shape(3, 4)).tp == 12
    with pytest.raises(MeshError, match="world size"):
        parse_recipe("tp=3").mesh(Shape(1, 4))


@pytest.mark.parametrize("text", ["", "tp", "tp=0", "tp=x", "tp=2 pp=2", "tp=-1", "ep=2", "tp=2,"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(ConfigError, match="--mesh"):
        parse_recipe(text)


def test_numbers_and_shapes():
    assert parse_numbers("4,1,2,2", "--nodes") == [1, 2, 4] and parse_shape("4x2") == Shape(4, 2)
    for text in ("", "0", "1,", "1-4", "a"):
        with pytest.raises(ConfigError, match="--nodes"):
            parse_numbers(text, "--nodes")
    for text in ("4", "4x", "0x2", "4x2x1"):
        with pytest.raises(ConfigError, match="--only"):
            parse_shape(text)
