import numpy as np
import pytest
import torch

from hpcinfer.errors import ConfigError
from hpcinfer.kernels import Placement, create_kernels


def test_unknown_kernels_and_devices_are_named():
    with pytest.raises(ConfigError, match="'fast'"):
        create_kernels("fast")
    with pytest.raises(ConfigError, match="'tpu'"):
        create_kernels("reference", device="tpu")


def test_more_threads_are_refused_with_a_warning(caplog):
    create_kernels("reference", placement=Placement(4))
    assert "one thread, not 4" in caplog.text and torch.get_num_threads() == 1


def test_profiles_of_one_machine_are_equal():
    profile = create_kernels("reference").profile()
    assert profile == create_kernels("reference").profile()
    assert profile["kernels"] == "reference" and len(profile["probe"]) == 16 and profile["rows_per_product"] == "16"


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_grain_stats_leave_padding_out(num_rows):
    sizes = (100, 7, 0)
    logits = np.random.default_rng(0).standard_normal((num_rows, 3, 128)).astype(np.float32) * 5
    stats = create_kernels("reference").grain_stats(logits, sizes)
    for grain, size in enumerate(sizes[:2]):
        maxima = logits[:, grain, :size].max(1)
        sums = np.exp(logits[:, grain, :size].astype(np.float64) - maxima[:, None]).sum(1)
        np.testing.assert_array_equal(stats.maxima[:, grain], maxima)
        np.testing.assert_allclose(stats.exp_sums[:, grain], sums, rtol=1e-6)
    assert (stats.maxima[:, 2] == -np.inf).all() and (stats.exp_sums[:, 2] == 0).all()


def test_grain_stats_of_a_row_are_the_same_in_any_batch():
    kernels = create_kernels("reference")
    logits = np.random.default_rng(0).standard_normal((9, 2, 192)).astype(np.float32)
    whole, alone = kernels.grain_stats(logits, (190, 150)), kernels.grain_stats(logits[4:5, 1:], (150,))
    assert whole.exp_sums[4, 1] == alone.exp_sums[0, 0] and whole.maxima[4, 1] == alone.maxima[0, 0]


def test_exp_and_log_leave_their_operand_alone():
    kernels = create_kernels("reference")
    x = np.linspace(0.5, 2, 7, dtype=np.float32)[::2]
    before = x.copy()
    np.testing.assert_allclose(kernels.log(kernels.exp(x)), x, rtol=1e-6)
    assert kernels.log(x).dtype == np.float32 and kernels.log(x.astype(np.float64)).dtype == np.float64
    assert (x == before).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_kv_bytes_are_those_of_the_cache(dtype):
    kernels = create_kernels("reference")
    more, less = (kernels.kv_cache(blocks, 16, 2, 20, dtype).values.nbytes for blocks in (5, 1))
    assert more - less == 4 * 16 * 2 * kernels.kv_bytes(20, dtype)


def test_host_and_device_are_views():
    kernels = create_kernels("reference")
    array = kernels.empty((2, 3))
    kernels.host(array)[:] = 7
    assert array.tolist() == [[7] * 3] * 2
    values = np.zeros(3, np.float32)
    kernels.device(values).add_(1)
    assert values.tolist() == [1, 1, 1]


def test_residuals_and_biases_are_added():
    kernels = create_kernels("reference")
    x = torch.arange(6.0).view(3, 2)
    assert kernels.add_residual(x.clone(), x).tolist() == (2 * x).tolist()
    assert kernels.add_residual(x.clone(), x, torch.tensor([1.0, -1.0])).tolist() == [[1, 1], [5, 5], [9, 9]]


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_argmax_is_the_lowest_place_of_the_largest_true_logit(num_rows):
    logits = np.random.default_rng(0).integers(0, 4, (num_rows, 3, 8)).astype(np.float32)
    logits[:, 0, 5:] = 99  # padding
    logits[1:2] = np.nan
    best = create_kernels("reference").argmax(logits, (5, 0, 8))
    for row, value, place in zip(logits, *best, strict=True):
        true = np.concatenate((row[0, :5], row[2]))
        expected = (-np.inf, 0) if np.isnan(true).all() else (true.max(), true.argmax())
        assert (value, place) == expected
    none = create_kernels("reference").argmax(logits, (0, 0, 0))
    assert (none.values == -np.inf).all() and (none.places == 0).all()


def test_largest_orders_by_value_then_place():
    row = np.array([1, 3, np.nan, 3, 2, -np.inf], np.float32)
    assert create_kernels("reference").largest(row, 4).tolist() == [1, 3, 4, 0]
