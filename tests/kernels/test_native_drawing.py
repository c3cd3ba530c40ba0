"""Draws of the native kernels: on every instruction set and number of threads what the shared definition chooses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("hpcinfer.kernels.native._native", reason="the native kernels were not built")

from hpcinfer.kernels import Placement, create_kernels
from hpcinfer.kernels.native.library import instruction_sets, load
from hpcinfer.kernels.protocol import Changes, Draw
from hpcinfer.kernels.sampling import draw_rows

LIBRARY = load(local_rank=None)
ISAS = instruction_sets(LIBRARY)
REFERENCE = create_kernels("reference")
KERNELS = {threads: create_kernels("native", placement=Placement(threads, None)) for threads in (1, 3)}
GRAINS = {1: (1,), 7: (3, 0, 4), 255: (255,), 256: (100, 156), 300: (256, 44), 3000: (1500, 1499, 1)}
# Temperatures at which few, many and all ids count; sums of probabilities that are hit exactly, and that never are.
draws = st.builds(
    Draw, st.sampled_from([0.0, 5e-324, 0.2, 1.0, 5.0, 1e30]), st.sampled_from([-1, 0, 1, 40, 2000]),
    st.sampled_from([1.0, 1 - 1e-9, 0.95, 0.5, 1e-6]), st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
    st.one_of(st.floats(0, 1 - 2**-53), st.sampled_from([0.0, 0.5, 1 - 2**-53])), st.sampled_from([-1, -1, -1, 0]),
    st.none(),
)  # fmt: skip


@pytest.fixture(autouse=True)
def best_instructions_at_the_end():
    yield
    LIBRARY.lib.hpc_use(ISAS[0].encode())


def random_changes(rng, size):
    """What becomes of some logits: forbidden, repeated, counted."""
    places = np.sort(rng.choice(size, rng.integers(0, min(size, 20) + 1), replace=False))
    biases = rng.choice([0.0, -np.inf, 2.5], len(places)).astype(np.float32)
    factors = rng.choice([1.0, 1.3, 0.7], len(places)).astype(np.float32)
    return Changes(places, biases, factors, rng.uniform(-2, 2, len(places)).astype(np.float32))


def some_rows(rng, size, num_rows):
    """Rows as they come, and broken ones."""
    kinds = [
        lambda: rng.standard_normal(size) * rng.choice([0.01, 1.0, 8.0]),
        lambda: np.round(rng.standard_normal(size)),  # many ties, zeros of both signs
        lambda: rng.choice([1.0, np.nan, -np.inf], size), lambda: np.full(size, -np.inf),
        lambda: rng.choice([0.0, np.inf], size, p=[0.9, 0.1]), lambda: np.zeros(size),
        lambda: -rng.exponential(3.0, size) * rng.choice([1, 30]),
    ]  # fmt: skip
    return [kinds[rng.integers(len(kinds))]().astype(np.float32) for _ in range(num_rows)]


def in_grains(rows, sizes):
    """Rows [V] as [R, G, U]; padded columns mean nothing."""
    logits = np.full((len(rows), len(sizes), max(sizes) + 3), 1e9, np.float32)
    for i, row in enumerate(rows):
        for g, part in enumerate(np.split(row, np.cumsum(sizes)[:-1])):
            logits[i, g, : len(part)] = part
    return logits


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from(list(GRAINS)), how=st.lists(draws, max_size=5),
       has_changes=st.booleans())  # fmt: skip
def test_draws_are_those_of_the_shared_definition(seed, size, how, has_changes):
    rng = np.random.default_rng(seed)
    logits = in_grains(some_rows(rng, size, len(how)), GRAINS[size])
    if has_changes:
        how = [draw._replace(changes=random_changes(rng, size) if rng.random() < 0.7 else None) for draw in how]
    before = logits.tobytes()
    expected = draw_rows(logits, GRAINS[size], how, KERNELS[1]).tolist()
    for isa in ISAS:
        LIBRARY.lib.hpc_use(isa.encode())
        for threads, kernels in KERNELS.items():
            assert kernels.draw(logits, GRAINS[size], how).tolist() == expected, (isa, threads)
    assert logits.tobytes() == before


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from(list(GRAINS)), num_rows=st.integers(1, 5))
def test_the_largest_of_changed_rows_is_that_of_the_reference(seed, size, num_rows):
    rng = np.random.default_rng(seed)
    logits = in_grains(some_rows(rng, size, num_rows), GRAINS[size])
    changes = {i: random_changes(rng, size) for i in range(num_rows) if rng.random() < 0.7}
    expected = REFERENCE.argmax(logits, GRAINS[size], changes)
    for isa in ISAS:
        LIBRARY.lib.hpc_use(isa.encode())
        for kernels in KERNELS.values():
            found = kernels.argmax(logits, GRAINS[size], changes)
            assert found.places.tolist() == expected.places.tolist()
            assert found.values.tolist() == expected.values.tolist()


def test_a_rank_without_ids_has_no_largest():
    some = Changes(np.empty(0, np.int64), *np.empty((3, 0), np.float32))
    found = KERNELS[1].argmax(np.zeros((1, 2, 5), np.float32), (0, 0), {0: some})
    assert found.values.tolist() == [-np.inf] and found.places.tolist() == [0]


def test_every_id_of_a_wide_nucleus_can_be_drawn():
    row = np.zeros(1000, np.float32)
    how = [Draw(1.0, top_p=0.5, u=(i + 0.5) / 500) for i in range(500)]
    assert KERNELS[3].draw(in_grains([row] * 500, (1000,)), (1000,), how).tolist() == list(range(500))
