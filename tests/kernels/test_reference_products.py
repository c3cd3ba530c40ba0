import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.kernels import create_kernels, reference_products
from hpcinfer.kernels.protocol import Weight
from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce

SHAPES = [(1, 5, 7), (3, 12, 20), (8, 64, 96), (2, 128, 56), (4, 37, 1)]  # grains, out, in


def random_weight(grains, num_out, num_in, seed=0):
    return np.random.default_rng(seed).standard_normal((grains, num_out, num_in)).astype(np.float32)


@pytest.fixture(params=["tiled", "row by row"])
def kernels(request, monkeypatch):
    """Kernels of this machine, and those of a machine whose matrix library fails the probe."""
    if request.param == "row by row":
        monkeypatch.setattr(reference_products, "rows_are_alike", lambda num_out, num_in: False)
    return create_kernels("reference")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 33])
def test_grain_linear_is_a_product_per_grain(kernels, shape, num_rows):
    raw = random_weight(*shape)
    x = random_weight(1, num_rows, shape[2], seed=1)[0]
    bias = random_weight(1, *shape[:2], seed=2)[0]
    found = kernels.host(kernels.grain_linear(kernels.device(x), kernels.linear(Weight(raw, "float32")),
                                              kernels.vector(bias)))  # fmt: skip
    expected = np.einsum("ti,goi->tgo", x.astype(np.float64), raw) + bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_batch(kernels, shape):
    weight = kernels.linear(Weight(random_weight(*shape), "float32"))
    x = torch.from_numpy(random_weight(1, 50, shape[2], seed=1)[0])
    whole = kernels.grain_linear(x, weight)
    for start, stop in ((0, 1), (7, 8), (3, 20), (17, 50), (49, 50)):
        assert torch.equal(kernels.grain_linear(x[start:stop], weight), whole[start:stop])
    shuffled = torch.randperm(50)
    assert torch.equal(kernels.grain_linear(x[shuffled], weight), whole[shuffled])
    strided = torch.randn(51, shape[2] + 3)
    strided[1:, 1:-2] = x
    assert torch.equal(kernels.grain_linear(strided[1:, 1:-2], weight), whole)


@settings(max_examples=25)
@given(tp=st.integers(1, 8), num_rows=st.integers(0, 20), num_out=st.integers(1, 40), width=st.integers(1, 40))
def test_partial_sums_have_the_same_bits_for_every_tp(tp, num_rows, num_out, width):
    kernels = create_kernels("reference")
    raw = random_weight(8, num_out, width)
    x = torch.from_numpy(random_weight(num_rows, 8, width, seed=1))
    [expected] = kernels.partial_linear(x, kernels.linear(Weight(raw, "float32")), [(0, 8)])
    nodes = {}
    for run in grain_runs(8, tp):
        spans = subtrees(run)
        local = [(span.start - run.start, span.stop - run.start) for span in spans]
        weight = kernels.linear(Weight(raw[run.start : run.stop], "float32"))
        nodes.update(zip(spans, kernels.partial_linear(x[:, run.start : run.stop], weight, local), strict=True))
    assert torch.equal(tree_reduce(nodes, Span(0, 8), torch.add), expected)
    np.testing.assert_allclose(expected, np.einsum("tgi,goi->to", x.double(), raw), rtol=1e-4, atol=1e-4)


def test_column_and_row_products_chain_without_losing_padding():
    kernels = create_kernels("reference")
    gate, down = random_weight(4, 20, 24), random_weight(4, 24, 20, seed=1)
    x = torch.randn(19, 24)
    middle = kernels.grain_linear(x, kernels.linear(Weight(gate, "float32")))
    weight = kernels.linear(Weight(down, "float32"))
    [found] = kernels.partial_linear(kernels.silu_mul(middle, middle), weight, [(0, 4)])
    wide = np.einsum("ti,goi->tgo", x.double(), gate)
    expected = np.einsum("tgi,goi->to", wide / (1 + np.exp(-wide)) * wide, down)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_precisions_are_widened_exactly(dtype):
    kernels = create_kernels("reference")
    exact = torch.randn(2, 3, 16).to(getattr(torch, dtype))
    raw = exact.view(torch.uint16).numpy() if dtype == "bfloat16" else exact.numpy()
    identity = torch.eye(16)
    found = kernels.grain_linear(identity, kernels.linear(Weight(raw, dtype)))
    assert torch.equal(found, exact.float().permute(2, 0, 1))
    assert torch.equal(kernels.prepare_table(Weight(raw, dtype)), exact.float())


def test_weights_may_be_read_only():
    raw = random_weight(2, 16, 16)
    raw.flags.writeable = False
    kernels = create_kernels("reference")
    kernels.linear(Weight(raw, "float32"))
    kernels.vector(raw[0, 0]).add_(1)
    assert kernels.device(raw[0]).shape == (16, 16)


def test_embedding_takes_own_rows_and_zeros_else():
    kernels = create_kernels("reference")
    table = random_weight(2, 64, 10)
    table[0, 1] = -0.0
    ids = np.array([19, 20, 22, 23, 24, 25, 21])
    found = kernels.embed(kernels.prepare_table(Weight(table, "float32")), (20, 23), (3, 2), ids)
    expected = np.zeros((7, 10), np.float32)
    expected[[1, 2, 3, 4]] = table[0, 0], table[0, 2], table[1, 0], table[1, 1]
    assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("num_out", range(16, 400, 48))
def test_the_probe_passes_for_padded_shapes(num_out):
    assert all(reference_products.rows_are_alike(num_out, num_in) for num_in in range(16, 400, 48))
