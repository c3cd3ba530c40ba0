"""Ids that stay on the device."""

import pytest
import torch


@pytest.fixture
def kept(device):
    from hpcinfer.kernels.gpu.kept import KeptIds

    return KeptIds(device)


def test_kept_ids_stand_where_the_host_knows_none(kept, on_device):
    rows = on_device(torch.arange(100, 150, dtype=torch.int32))
    kept.keep(on_device(torch.tensor([7, 49, 50, 0])), [0, 1, 2, 3])
    ids = on_device(torch.tensor([3, -1, -2, -3, -4, 49, 10**6] * 30, dtype=torch.int32))
    assert kept.find(ids, rows).tolist() == [103, 107, 149, 149, 100, 149, 149] * 30


def test_rows_that_are_not_given_keep_what_they_have(kept, on_device):
    rows = on_device(torch.arange(50, dtype=torch.int32))
    for ids, places in (([1, 2, 3], [0, 1, 2]), ([8, 9], [1, 5]), ([4], [0])):
        kept.keep(on_device(torch.tensor(ids)), places)
    ids = on_device(torch.tensor([-1, -2, -3, -6], dtype=torch.int32))
    assert kept.find(ids, rows).tolist() == [4, 8, 3, 9]


def test_no_id_has_no_row(kept, on_device):
    nothing = on_device(torch.empty(0, dtype=torch.int32))
    assert kept.find(nothing, on_device(torch.zeros(1, dtype=torch.int32))).shape == (0,)
