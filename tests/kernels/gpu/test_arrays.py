"""Arrays of a GPU as those see them who move and add them; on a GPU where there is one."""

from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.kernels.gpu.arrays import GpuArrays
from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce
from hpcinfer.partition.tree_program import tree_program

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="module")
def arrays():
    found = GpuArrays(DEVICE)
    found.bind()
    return found


def values_of(grains, length, seed=0):
    """Numbers whose float32 sum depends on the order, and zeros of both signs."""
    random = np.random.default_rng([grains, length, seed])
    values = (random.standard_normal((grains, length)) * 10.0 ** random.integers(-6, 7, (grains, length))).astype("f4")
    values[:, ::7] = -0.0
    return values


@given(grains=st.sampled_from([1, 2, 8, 16]), ranks=st.integers(1, 16), length=st.sampled_from([0, 1, 17, 1000]))
def test_programs_give_the_bits_of_the_tree(grains, ranks, length):
    arrays, ranks = GpuArrays(DEVICE), min(grains, ranks)
    values = values_of(grains, length)
    leaves = {Span(grain, grain + 1): value for grain, value in enumerate(values)}
    program = tree_program([subtrees(run) for run in grain_runs(grains, ranks)])
    nodes = [[torch.from_numpy(tree_reduce(leaves, span, add).copy()).to(DEVICE) for span in rank]
             for rank in program.nodes_by_rank]  # fmt: skip
    out = arrays.empty(length)
    run = arrays.evaluation(program, nodes, [out])
    kept = [[node.clone() for node in rank] for rank in nodes]
    for _ in range(2):
        run()
        assert out.cpu().numpy().tobytes() == tree_reduce(leaves, Span(0, grains), add).tobytes()
        torch._foreach_copy_(sum(nodes, []), sum(kept, []))


def test_a_program_of_some_ranks_has_a_result_for_each_node_that_is_left(arrays):
    values = values_of(8, 33)
    leaves = {Span(grain, grain + 1): value for grain, value in enumerate(values)}
    program = tree_program([subtrees(range(1, 4)), subtrees(range(4, 5))])
    assert len(program.results) > 1
    nodes = [[torch.from_numpy(tree_reduce(leaves, span, add).copy()).to(DEVICE) for span in rank]
             for rank in program.nodes_by_rank]  # fmt: skip
    outs = [arrays.empty(33) for _ in program.results]
    arrays.evaluation(program, nodes, outs)()
    expected = [tree_reduce(leaves, span, add).tobytes() for span in program.outputs]
    assert [out.cpu().numpy().tobytes() for out in outs] == expected


def test_additions_that_do_not_need_one_another_are_one_launch(arrays, monkeypatch):
    program = tree_program([subtrees(range(each, each + 1)) for each in range(8)])
    launches = []
    monkeypatch.setattr(torch, "_foreach_add_", lambda lefts, rights: launches.append(len(lefts)))
    monkeypatch.setattr(torch, "add", lambda left, right, out: launches.append("last"))
    arrays.evaluation(program, [[arrays.empty(9)] for _ in range(8)], [arrays.empty(9)])()
    assert launches == [4, 2, "last"]


def test_bytes_go_to_pinned_memory_and_back(arrays):
    for source in (torch.arange(12, dtype=torch.float32).view(3, 4), torch.zeros(0), torch.ones(5, dtype=torch.uint8)):
        there, back = source.to(DEVICE), torch.full_like(source, 3, device=DEVICE)
        host = arrays.pinned(arrays.num_bytes(there))
        arrays.to_host(there, host)
        arrays.wait(lambda: None)
        assert host.tobytes() == source.numpy().tobytes()
        arrays.to_device(host, back)
        assert torch.equal(back.cpu(), source)


def test_arrays_say_where_and_what_they_are(arrays):
    array = arrays.empty(6)
    assert arrays.owns(array) and not arrays.owns(np.empty(6))
    assert (arrays.address(array[2:]) - arrays.address(array), arrays.num_bytes(array)) == (8, 24)
    assert arrays.flat(array.view(2, 3)).shape == (6,) and not arrays.is_recording()
    assert arrays.gpu_id == GpuArrays(DEVICE).gpu_id


def test_a_copy_to_itself_is_none(arrays, monkeypatch):
    array, other = arrays.empty(3).fill_(1.0), arrays.empty(3)
    arrays.copy(array, other)
    assert other.tolist() == [1.0] * 3
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    arrays.copy(array, array[:3])


def test_what_a_check_raises_ends_a_wait():
    class Never:
        def query(self):
            return False

    def check():
        raise ConnectionError("a rank has died")

    with pytest.raises(ConnectionError):
        GpuArrays(torch.device("cpu")).wait(check, Never())


def test_two_processes_name_a_gpu_alike_and_two_gpus_differently(monkeypatch):
    class Properties:
        def __init__(self, uuid):
            self.uuid = uuid

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(f"GPU-{device.index}"))
    assert [GpuArrays(torch.device("cuda", index)).gpu_id for index in (0, 1)] == ["GPU-0", "GPU-1"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    third = GpuArrays(torch.device("cuda", 0)).gpu_id
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert GpuArrays(torch.device("cuda", 0)).gpu_id != third
