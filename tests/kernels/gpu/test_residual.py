"""Additions that wait for a norm give the bits of those that do not, whoever reads the residual stream meanwhile."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def residual(device):
    from hpcinfer.kernels.gpu import residual

    return residual


def tensors(on_device, rows=3, size=40):
    random = np.random.default_rng(rows)
    shapes = ((rows, size), (rows, size), (size,), (size,))
    return [on_device(random.standard_normal(shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bits_are_those_of_an_addition_and_a_norm(residual, on_device, dtype, has_bias):
    from hpcinfer.kernels.gpu.rows import rms_norm

    x, total, bias, weight = tensors(on_device)
    bias = bias if has_bias else None
    added = x + (total if bias is None else total + bias)
    expected = rms_norm(added, weight, 1e-5, dtype)
    residuals = residual.Residuals()

    def work():
        assert residuals.add(x, total, bias) is x and not torch.equal(x, added)
        return residuals.norm(x, weight, 1e-5, dtype)

    found = residuals.around(work)()
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8)) and torch.equal(x, added)
    assert (found.scales is None) is (expected.scales is None)
    assert found.scales is None or torch.equal(found.scales, expected.scales)


def read_a_part(residuals, x, weight):
    return residuals.norm(x[1:], weight, 1e-5, torch.float32)


def read_another(residuals, x, weight):
    return residuals.norm(x.clone(), weight, 1e-5, torch.float32)


def add_again(residuals, x, weight):
    return residuals.add(x, torch.zeros_like(x))


def end(residuals, x, weight):
    return x


@pytest.mark.parametrize("read", [read_a_part, read_another, add_again, end])
def test_nothing_is_read_before_it_is_added(residual, on_device, read):
    x, total, _, weight = tensors(on_device)
    added, residuals = x + total, residual.Residuals()
    residuals.around(lambda: read(residuals, residuals.add(x, total), weight))()
    assert torch.equal(x, added)


def test_additions_wait_in_such_work_only(residual, on_device):
    x, total, *_ = tensors(on_device)
    residuals, expected = residual.Residuals(), x + 2 * total

    def fail():
        residuals.add(x, total)
        raise MemoryError

    residuals.add(x, total)
    with pytest.raises(MemoryError):
        residuals.around(fail)()
    residuals.add(x, total)
    torch.testing.assert_close(x, expected)


def test_additions_wait_while_layers_run(make, on_device):
    kernels, (x, total, *_) = make(graphs=False), tensors(on_device)
    before, seen = x.clone(), []

    def work(step, hidden):
        seen.append(kernels.add_residual(hidden, total).clone())
        seen.append(kernels.join([hidden[:1], hidden[2:]]))
        return kernels.add_residual(hidden, total)

    found = kernels.run_layers(None, x, work, kernels, is_alone=True)
    assert torch.equal(seen[0], before) and torch.equal(seen[1], (before + total)[[0, 2]])
    assert torch.equal(found, before + total + total)


def test_squares_are_added_in_one_order_on_a_gpu(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("norm_layouts.py")
    done = subprocess.run([sys.executable, script], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    layouts = json.loads(done.stdout)
    assert len(layouts) == 5 and all(len(set(each)) == 1 and len(each) == 3 for each in layouts.values()), layouts
