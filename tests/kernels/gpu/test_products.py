"""Products: right against float64, and no bit from the number of rows, tiles, grains that a rank holds, or programs."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import DTYPES, random_weight

from hpcinfer.dtypes import dequantise
from hpcinfer.kernels.protocol import Weight
from hpcinfer.kernels.reference import ReferenceKernels
from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = st.integers(1, 70)


class Kit(NamedTuple):
    """What prepares weights and multiplies with them."""

    products: object
    library: object  # the same without the contract
    preparer: object
    module: object


@pytest.fixture(scope="module")
def kit(device):
    from hpcinfer.kernels.gpu import products
    from hpcinfer.kernels.gpu.weights import Preparer

    made = [products.Products(device, reproducible=reproducible) for reproducible in (True, False)]
    return Kit(*made, Preparer(device, "auto"), products)


def linear(products, x, weight):
    """Products of rows that are rounded or quantised before."""
    from hpcinfer.kernels.gpu.products import operand_of

    return products.linear(operand_of(x, weight), weight)


def gated(products, x, weight, dtype):
    from hpcinfer.kernels.gpu.products import operand_of

    return products.gated(operand_of(x, weight), weight, dtype)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(weight, num_in):
    """A weight in float64, without the padding of int4."""
    values = dequantise(weight.values, weight.dtype, weight.scales)[..., :num_in]
    return torch.from_numpy(values.astype(np.float64))


def rounded(x, dtype):
    """What is multiplied with weights of a type."""
    return x.to(TYPES.get(dtype, torch.bfloat16))


@settings(max_examples=20)
@given(dtype=st.sampled_from(["float32", "bfloat16", "float16", "int4"]), num_rows=SIZES, num_in=SIZES, num_out=SIZES,
       has_bias=st.booleans())  # fmt: skip
def test_products_agree_with_float64(kit, on_device, dtype, num_rows, num_in, num_out, has_bias):
    random = np.random.default_rng(num_in)
    weight, bias = random_weight(random, dtype, 2, num_out, num_in), random.standard_normal((2, num_out), np.float32)
    x = rounded(randn(num_rows, num_in), dtype)
    prepared = kit.preparer.columns([weight], [bias] if has_bias else [])
    found = linear(kit.products, on_device(x), prepared).cpu()
    expected = x.double() @ wide(weight, num_in).flatten(0, 1).T + (torch.from_numpy(bias).flatten() if has_bias else 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 70])
def test_products_of_codes_are_those_of_the_reference(kit, on_device, num_rows):
    weight, x = random_weight(np.random.default_rng(1), "int8", 4, 40, 36), randn(num_rows, 36)
    reference = ReferenceKernels()
    found = linear(kit.products, on_device(x), kit.preparer.columns([weight])).cpu()
    assert torch.equal(found, reference.grain_linear(x, reference.linear(weight)).flatten(1))
    x, out = randn(num_rows, 4 * 36), on_device(torch.empty(2, num_rows, 40))
    kit.products.sums(on_device(x), kit.preparer.rows(weight), [(0, 2), (2, 4)], out)
    expected = reference.partial_linear(x.view(num_rows, 4, 36), reference.linear(weight), [(0, 2), (2, 4)])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("num_rows", [1, 70])
def test_products_of_fp8_are_those_of_codes(kit, on_device, num_rows):
    weight, x = random_weight(np.random.default_rng(1), "float8_e4m3", 4, 40, 36), randn(num_rows, 4, 36)
    codes, scales = (each.double() for each in in_e4m3(x))
    expected = torch.einsum("tgi,goi->tgo", codes * scales, wide(weight, 36))
    out = on_device(torch.empty(2, num_rows, 40))
    kit.products.sums(on_device(x.flatten(1)), kit.preparer.rows(weight), [(0, 2), (2, 4)], out)
    torch.testing.assert_close(out[0].cpu().double(), expected[:, :2].sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1].cpu().double(), expected[:, 2:].sum(1), rtol=1e-5, atol=1e-6)
    x = x[:, 0].contiguous()
    codes, scales = (each.double() for each in in_e4m3(x))
    found = linear(kit.products, on_device(x), kit.preparer.columns([weight])).cpu().double()
    torch.testing.assert_close(found, codes * scales @ wide(weight, 36).flatten(0, 1).T, rtol=1e-5, atol=1e-6)


def in_e4m3(x):
    """Codes and scales of runs along the last axis."""
    largest = x.abs().amax(-1, keepdim=True)
    return (x * (448 / largest)).clamp(-448, 448).to(torch.float8_e4m3fn), largest / 448


@pytest.mark.parametrize("num_in, is_possible", [(64, True), (40, False)])
def test_the_library_multiplies_fp8_where_it_can(kit, on_device, device, monkeypatch, num_in, is_possible):
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, *, bias, out_dtype):
        calls.append((a.shape, b.shape, scale_a.shape, scale_b.shape))
        assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.t().is_contiguous()
        return (a.float() @ b.float() * scale_a * scale_b + bias).to(out_dtype)

    monkeypatch.setattr(kit.module, "has_scaled_products", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    random, x = np.random.default_rng(9), on_device(randn(20, num_in))
    weight = kit.preparer.columns([random_weight(random, "float8_e4m3", 2, 16, num_in)] * 2, [np.ones((2, 16))] * 2)
    for product, options in ((linear, ()), (gated, (torch.float32,))):
        ours, theirs = (product(each, x, weight, *options).float() for each in (kit.products, kit.library))
        torch.testing.assert_close(theirs, ours, rtol=2e-2, atol=2e-2)
    assert calls == [((20, num_in), (num_in, 64), (20, 1), (1, 64))] * 2 * is_possible
    assert linear(kit.library, x[:0], weight).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(kit, on_device, dtype):
    random = np.random.default_rng(2)
    x, columns = rounded(randn(140, 80), dtype), kit.preparer.columns([random_weight(random, dtype, 1, 150, 80)])
    rows = kit.preparer.rows(random_weight(random, dtype, 4, 20, 20))
    whole = linear(kit.products, on_device(x), columns)
    sums = on_device(torch.empty(1, 140, 20))
    kit.products.sums(on_device(x), rows, [(0, 4)], sums)
    for start, stop in ((0, 1), (3, 67), (130, 140), (5, 100)):
        part = on_device(x[start:stop].contiguous())
        assert torch.equal(linear(kit.products, part, columns), whole[start:stop])
        some = on_device(torch.empty(1, stop - start, 20))
        kit.products.sums(part, rows, [(0, 4)], some)
        assert torch.equal(some[0], sums[0, start:stop])


@pytest.mark.parametrize("num_rows", [2, 70])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_sums_have_the_same_bits_on_every_mesh(kit, on_device, dtype, num_rows):
    weight = random_weight(np.random.default_rng(3), dtype, 8, 24, 16)
    x = rounded(randn(num_rows, 8, 16), dtype)
    whole = on_device(torch.empty(1, num_rows, 24))
    kit.products.sums(on_device(x.flatten(1)), kit.preparer.rows(weight), [(0, 8)], whole)
    for tp in (1, 2, 3, 8):
        nodes = {}
        for run in grain_runs(8, tp):
            mine = slice(run.start, run.stop)
            held = Weight(weight.values[mine], dtype, None if weight.scales is None else weight.scales[mine])
            spans = subtrees(run)
            out = on_device(torch.empty(len(spans), num_rows, 24))
            local = [(span.start - run.start, span.stop - run.start) for span in spans]
            kit.products.sums(on_device(x[:, mine].flatten(1).contiguous()), kit.preparer.rows(held), local, out)
            nodes |= dict(zip(spans, out, strict=True))
        assert torch.equal(tree_reduce(nodes, Span(0, 8), torch.add), whole[0]), f"{tp = }"


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64])
def test_nodes_are_added_in_the_tree(kit, on_device, count):
    nodes = on_device(randn(count, 3, 7))
    out = torch.full_like(nodes[0], 7)
    expected = tree_reduce({Span(i, i + 1): node for i, node in enumerate(nodes)}, Span(0, count), torch.add)
    if count == 1:
        assert torch.equal(expected, nodes[0])
        return
    kit.module.add_nodes(nodes, out)
    assert torch.equal(out, expected)


def test_many_grains_are_walked_sixteen_at_a_time(kit, on_device):
    weight, x = random_weight(np.random.default_rng(4), "float32", 32, 5, 3), randn(70, 96)
    out, few = on_device(torch.empty(1, 70, 5)), on_device(torch.empty(1, 4, 5))
    kit.products.sums(on_device(x), kit.preparer.rows(weight), [(0, 32)], out)
    kit.products.sums(on_device(x[:4].contiguous()), kit.preparer.rows(weight), [(0, 32)], few)
    assert torch.equal(few[0], out[0, :4])
    expected = torch.einsum("tgi,goi->to", x.view(70, 32, 3).double(), wide(weight, 3))
    torch.testing.assert_close(out[0].cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 33, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_applied_where_they_are_made(kit, on_device, dtype, width):
    random = np.random.default_rng(5)
    weight = kit.preparer.columns([random_weight(random, dtype, 1, width, 40) for _ in range(2)])
    x = rounded(randn(66, 40), dtype)
    gate, up = linear(kit.products, on_device(x), weight).double().split(width, 1)
    found = gated(kit.products, on_device(x), weight, torch.float32).double()
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6)
    alone = gated(kit.products, on_device(x[9:10]), weight, torch.float32)
    assert torch.equal(alone.double(), found[9:10])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_agrees(kit, on_device, dtype):
    random, x = np.random.default_rng(6), rounded(randn(20, 64), dtype)
    columns = kit.preparer.columns([random_weight(random, dtype, 2, 20, 64)] * 2, [np.ones((2, 20))] * 2)
    rows = kit.preparer.rows(random_weight(random, dtype, 2, 24, 32))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != "float32" else {"rtol": 1e-5, "atol": 1e-5}
    ours, theirs = (linear(each, on_device(x), columns).float() for each in (kit.products, kit.library))
    torch.testing.assert_close(ours, theirs, **tolerance)
    ours, theirs = (gated(each, on_device(x), columns, torch.float32) for each in (kit.products, kit.library))
    torch.testing.assert_close(ours, theirs, **tolerance)
    sums = [on_device(torch.empty(2, 20, 24)) for _ in range(2)]
    for each, out in zip((kit.products, kit.library), sums, strict=True):
        each.sums(on_device(x), rows, [(0, 1), (1, 2)], out)
    torch.testing.assert_close(*sums, **tolerance)


def test_no_rows_and_no_inputs(kit, on_device):
    weight = random_weight(np.random.default_rng(7), "float32", 2, 5, 3)
    assert linear(kit.products, on_device(torch.empty(0, 3)), kit.preparer.columns([weight])).shape == (0, 10)
    none, out = on_device(torch.empty(1, 0, 5)), on_device(torch.ones(1, 2, 5))
    kit.products.sums(on_device(torch.empty(0, 6)), kit.preparer.rows(weight), [(0, 2)], none)
    empty = kit.preparer.rows(Weight(weight.values[..., :0], "float32"))
    kit.products.sums(on_device(torch.empty(2, 0)), empty, [(0, 2)], out)
    assert not out.any()


def test_tiles_that_differ_in_a_bit_are_not_used(kit, device, monkeypatch, caplog):
    launch, used = kit.module.launch, []

    def spoiled(call, tile):
        launch(call, tile)
        used.append(tile)
        if tile == kit.module.WIDE:
            call.out[3, 5] += 1

    assert kit.module.tiles_are_alike(torch.float16, device)
    monkeypatch.setattr(kit.module, "launch", spoiled)
    kit.module.tiles_are_alike.cache_clear()
    assert not kit.module.tiles_are_alike(torch.float16, device) and "only narrow ones" in caplog.text
    products = kit.module.Products(device, reproducible=True)
    weight = kit.preparer.columns([random_weight(np.random.default_rng(8), "float16", 1, 5, 4)])
    linear(products, torch.ones(100, 4, dtype=torch.float16, device=device), weight)
    assert used[-1] == kit.module.NARROW
    kit.module.tiles_are_alike.cache_clear()


@pytest.mark.parametrize("capability, hip, expected", [((9, 0), None, True), ((8, 9), None, True),
                                                       ((8, 6), None, False), ((9, 4), "7.0", False)])  # fmt: skip
def test_fp8_is_multiplied_where_nvidia_does(kit, monkeypatch, capability, hip, expected):
    from hpcinfer.kernels.gpu import codes

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert codes.has_fp8.__wrapped__(torch.device("cuda", 0)) == expected
    assert not codes.has_fp8.__wrapped__(torch.device("cpu"))


def test_a_library_that_refuses_fp8_is_not_asked(kit, device, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise RuntimeError("rowwise scaling is for another GPU")

    monkeypatch.setattr(kit.module, "has_fp8", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with caplog.at_level("DEBUG"):
        assert not kit.module.has_scaled_products.__wrapped__(device)
    assert "for another GPU" in caplog.text
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: None)
    assert kit.module.has_scaled_products.__wrapped__(device)
    monkeypatch.setattr(kit.module, "has_fp8", lambda device: False)
    assert not kit.module.has_scaled_products.__wrapped__(device)
