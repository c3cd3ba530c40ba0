"""What --auto chooses: few points, and only what the model allows."""

import pytest
from golden import DEMO_MODEL
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.partition.layout import ModelLimits
from hpcinfer.scaling.auto import MOST_SIZES, Room, choose_recipes, choose_shapes, read_limits
from hpcinfer.scaling.plan import Recipe, Shape

rooms = st.builds(Room, st.integers(1, 5000), st.integers(1, 200))


@given(rooms, st.builds(ModelLimits, st.integers(1, 130), st.sampled_from([1, 8, 16])))
def test_points_are_few_and_possible(room, limits):
    shapes = choose_shapes(room)
    recipes = choose_recipes(shapes, limits)
    assert 1 <= len(shapes) <= MOST_SIZES and 1 <= len(recipes) <= 3 and Recipe() in recipes
    assert shapes == sorted(set(shapes)) and shapes[0].ranks == (room.ranks_per_node if room.nodes > 1 else 1)
    assert shapes[-1] == Shape(*room)  # all that there is
    for mesh in (recipe.mesh(shape) for recipe in recipes for shape in shapes):
        assert mesh.tp <= limits.grains and mesh.pp <= limits.num_layers


def test_meshes_that_one_would_try():
    shapes = choose_shapes(Room(4, 2))
    assert shapes == [Shape(1, 2), Shape(2, 2), Shape(4, 2)]
    assert choose_recipes(shapes, None) == [Recipe(), Recipe(tp="node"), Recipe("nodes", "node")]
    assert choose_recipes(shapes, ModelLimits(2, 8)) == [Recipe(), Recipe(tp="node")]
    assert choose_shapes(Room(1, 3)) == [Shape(1, 1), Shape(1, 2), Shape(1, 3)]


def test_limits_are_read_from_a_model_without_a_store():
    limits = read_limits(str(DEMO_MODEL))
    assert limits is not None and limits.num_layers >= 1 and limits.grains == 8


@pytest.mark.parametrize("model", ["nowhere", "tests", "no/model"])
def test_unknown_limits_are_none(model):
    assert read_limits(model) is None
