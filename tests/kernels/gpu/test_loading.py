"""Copies to a device overlap with reading, and pinned memory is used again only when it is free."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from random_weights import DTYPES, random_weight

PAGE = 4096


class Mark(NamedTuple):
    """A place in the fake stream."""

    number: int
    log: list

    def synchronize(self):
        self.log.append(("waited for", self.number))


class FakeLane:
    """A stream that writes down what happens."""

    def __init__(self):
        self.log, self.is_copying, self.memory = [], False, []

    def pinned(self, num_bytes):
        self.memory.append(np.zeros(num_bytes, np.uint8))
        return self.memory[-1]

    @contextmanager
    def copying(self):
        self.is_copying = True
        yield
        self.is_copying = False

    def mark(self):
        self.log.append(("mark", sum(name == "mark" for name, _ in self.log)))
        return Mark(self.log[-1][1], self.log)

    def hand_over(self, mark):
        assert not self.is_copying
        self.log.append(("handed over", mark.number))


@pytest.fixture
def loading(device, monkeypatch):
    from hpcinfer.kernels.gpu import loading

    monkeypatch.setattr(loading, "ARRAYS_BYTES", 64 * PAGE)
    monkeypatch.setattr(loading, "PIECES_BYTES", 4 * PAGE)
    monkeypatch.setattr(loading, "PIECE_BYTES", 2 * PAGE)
    return loading


def make(loading):
    lane = FakeLane()
    return loading.Loader(torch.device("cpu"), lane), lane


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_pieces_follow_each_other_without_waiting(loading):
    loader, lane = make(loading)
    values, target = numbers(1, 6, 1024), torch.zeros(1, 6, 1024)  # three pieces of two rows; there is room for two
    loader.fill(target, values, torch.float32)
    loader.hand_over()
    assert torch.equal(target, torch.from_numpy(values))
    assert lane.log == [("mark", 0), ("mark", 1), ("waited for", 0), ("mark", 2), ("mark", 3), ("handed over", 3)]


def test_what_was_read_into_pinned_memory_is_copied_from_there(loading):
    loader, lane = make(loading)
    room = loader.staging(32 * PAGE)
    values = room.view(np.float32).reshape(8, 4096, 1)
    values[...] = numbers(8, 4096, 1)
    target = torch.zeros(8, 4096, 1, dtype=torch.bfloat16)
    loader.fill(target, values, torch.float32)
    assert torch.equal(target, torch.from_numpy(values).bfloat16())
    assert [memory.nbytes for memory in lane.memory] == [64 * PAGE]  # nothing was copied to other pinned memory
    loader.staging(30 * PAGE)
    assert ("waited for", 0) not in lane.log


def test_who_holds_on_does_not_keep_others_from_their_turn(loading):
    loader, lane = make(loading)
    pinned, kept = loader._arrays, loader.staging(32 * PAGE)
    for _ in range(5):
        for _ in range(2):
            assert pinned.holds(room := loader.staging(16 * PAGE))
            loader.fill(torch.zeros(1, 1, 1), room[:1].reshape(1, 1, 1), torch.uint8)
            del room
    assert [number for name, number in lane.log if name == "waited for"] == list(range(8)) and pinned.holds(kept)


def test_memory_in_use_is_never_handed_out(loading):
    loader, lane = make(loading)
    pinned, first, second = loader._arrays, loader.staging(20 * PAGE), loader.staging(20 * PAGE)
    view = first[PAGE:].view(np.float32)  # whoever keeps a view keeps the memory
    del first
    plain = loader.staging(30 * PAGE)
    assert pinned.holds(view) and pinned.holds(second) and not pinned.holds(plain)  # the holder may wait for us
    loader.fill(torch.zeros(1, 1, 5), view[:5].reshape(1, 1, 5), torch.float32)
    del view, second
    again = loader.staging(30 * PAGE)
    assert pinned.holds(again) and lane.log == [("mark", 0), ("waited for", 0)]


def test_parts_never_overlap(loading):
    pinned, random = loading.PinnedRing(lambda size: np.zeros(size, np.uint8), 64 * PAGE), np.random.default_rng(1)
    held, num_taken = [], 0
    for number in range(400):
        found = pinned.take(int(random.integers(1, 20 * PAGE)))
        if found is not None:
            found[:] = number % 256
            held.append((number % 256, found))
            num_taken += 1
        if held and (found is None or random.random() < 0.4):
            expected, oldest = held.pop(0)
            assert (oldest == expected).all()
            del oldest
        del found
    assert num_taken > 200


def test_large_and_small_arrays_are_not_pinned(loading):
    loader, lane = make(loading)
    assert loader.staging(33 * PAGE).shape == (33 * PAGE,) and loader.staging(100).shape == (100,)
    assert not lane.memory
    values, target = numbers(1, 2, 8 * 1024), torch.zeros(1, 2, 8 * 1024)  # a row is more than all pieces
    loader.fill(target, values, torch.float32)
    assert torch.equal(target, torch.from_numpy(values)) and not lane.memory


def test_nothing_is_copied_of_nothing_and_read_only_memory_is_taken(loading):
    for loader in (make(loading)[0], loading.Loader(torch.device("cpu"))):
        loader.fill(torch.zeros(2, 0, 3), np.zeros((2, 0, 3), np.float32), torch.float32)
        values, target = numbers(2, 3, 4), torch.zeros(3, 2, 4)
        values.setflags(write=False)
        loader.fill(target.transpose(0, 1), values, torch.float32)
        assert torch.equal(target.transpose(0, 1), torch.from_numpy(values.copy()))
        loader.hand_over()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_the_same_by_any_way(loading, dtype):
    from hpcinfer.kernels.gpu.weights import Preparer

    random = np.random.default_rng(2)
    weights = [random_weight(random, dtype, units, 40, 96) for units in (3, 2)]
    loader, lane = make(loading)
    usual, pinned = Preparer(torch.device("cpu"), "auto"), Preparer(torch.device("cpu"), "auto", loader)
    for name, args in (("columns", (weights,)), ("rows", (weights[0],)), ("table", (weights[1],))):
        one, other = (getattr(each, name)(*args) for each in (usual, pinned))
        assert torch.equal(raw(one.values), raw(other.values)) and one.dtype == other.dtype
        assert (one.scales is None) == (other.scales is None)
        assert one.scales is None or torch.equal(one.scales, other.scales)
        assert lane.log[-1] == ("handed over", lane.log[-2][1])


def raw(values):
    return values.contiguous().view(torch.uint8)


def test_a_store_is_read_into_memory_that_is_given(tmp_path):
    from models import make_tiny_model

    from hpcinfer.comm.serial import SerialGroup
    from hpcinfer.weights.conversion import convert
    from hpcinfer.weights.reader import Store

    make_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1)
    convert(tmp_path / "model", tmp_path / "store", SerialGroup())
    with Store.open(tmp_path / "store") as store:
        expected, given = store.read("layers.0.up_proj.weight").values, []
        store.allocate = lambda num_bytes: given.append(np.empty(num_bytes, np.uint8)) or given[-1]
        found = store.read("layers.0.up_proj.weight").values
    np.testing.assert_array_equal(found, expected)
    assert np.shares_memory(found, given[0]) and found.ctypes.data % PAGE == 0
