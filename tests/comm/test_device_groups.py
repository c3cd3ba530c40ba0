"""Arrays of GPUs between ranks in threads, in each way that they may travel; with MPI: test_device_mpi.py."""

import numpy as np
import pytest
from gpu_threads import KINDS, on_gpus, part
from grain_values import own_nodes, tree_sum, values_of

from hpcinfer.partition.grains import grain_runs, subtrees
from hpcinfer.partition.tree_program import tree_program


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(5, 5, 5), (7, 0, 30_000)], ids=["even", "uneven"])
def test_gathers_concatenate(kind, counts):
    whole = np.concatenate([part(rank, count) for rank, count in enumerate(counts)])

    def work(group, gpu):
        mine = gpu.put(part(group.rank, counts[group.rank]))
        everywhere = gpu.empty(sum(counts))
        group.all_gather(mine, everywhere, counts)
        assert np.array_equal(gpu.get(everywhere), whole)
        for root in range(group.size):
            there = gpu.empty(sum(counts)) if group.rank == root else None
            group.gather(mine, there, counts, root)
            assert there is None or np.array_equal(gpu.get(there), whole)
        host = np.empty(sum(counts), np.float32)
        group.all_gather(part(group.rank, counts[group.rank]), host, counts)
        assert np.array_equal(host, whole)

    on_gpus(kind, 3, work)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broadcast_gives_all_the_root_s(kind):
    def work(group, gpu):
        for root in range(group.size):
            array = gpu.put(part(group.rank, 1000)).reshape(10, 100)
            group.broadcast(array, root)
            assert np.array_equal(gpu.get(array).ravel(), part(root, 1000))

    on_gpus(kind, 3, work)


@pytest.mark.parametrize("kind", KINDS)
def test_an_all_to_all_of_uneven_parts(kind):
    counts = [[3, 0, 5], [1, 2, 40_000], [0, 7, 1]]

    def work(group, gpu):
        rank, size = group.rank, group.size
        sent = np.concatenate([part(rank, counts[rank][peer], peer) for peer in range(size)])
        expected = np.concatenate([part(peer, counts[peer][rank], rank) for peer in range(size)])
        received = gpu.empty(len(expected))
        group.all_to_all(gpu.put(sent), received, counts)
        assert np.array_equal(gpu.get(received), expected)

    on_gpus(kind, 3, work)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reduce_scatter_adds_in_the_order_of_the_tree(kind):
    bounds = (0, 10, 10, 1000)
    values = values_of(8, (1000,))
    program = tree_program([subtrees(run) for run in grain_runs(8, 3)])

    def work(group, gpu):
        out = gpu.empty(bounds[group.rank + 1] - bounds[group.rank])
        nodes = [gpu.put(node) for node in own_nodes(values, grain_runs(8, 3)[group.rank])]
        group.reduce_scatter(program, nodes, out, bounds)
        return gpu.get(out).tobytes()

    assert b"".join(on_gpus(kind, 3, work)) == tree_sum(values)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_both_kinds_of_memory_keep_their_order(kind):
    def work(group, gpu):
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        if kind == "nccl":  # on one stream a ring of single messages would wait for itself
            before = after = group.rank ^ 1
        sent = []
        for salt in range(3):
            array = gpu.put(part(group.rank, 100, salt))
            if kind != "nccl" or group.rank < after:
                sent += [group.send(array, after, 3), group.send(part(group.rank, 9, salt), after, 4)]
        if kind != "nccl" or group.rank > before:
            for salt in range(3):
                room, host = gpu.empty(100), np.empty(9, np.float32)
                if salt:
                    group.receive(room, before, 3)
                else:
                    group.wait_all([group.start_receive(room, before, 3)])
                group.receive(host, before, 4)
                assert np.array_equal(gpu.get(room), part(before, 100, salt)), salt
                assert np.array_equal(host, part(before, 9, salt))
        for each in sent:
            each.wait()
            assert each.test()
        return group.broadcast_bytes(b"bytes" if group.rank == 0 else None), group.all_gather_bytes(b"%d" % group.rank)

    assert on_gpus(kind, 4, work) == [(b"bytes", [b"0", b"1", b"2", b"3"])] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_exchange_moves_what_the_arrays_hold_then(kind):
    def work(group, gpu):
        peers = [peer for peer in range(group.size) if peer != group.rank]
        mine, theirs = gpu.empty(50), {peer: gpu.empty(50) for peer in peers}
        exchange = group.prepare_exchange([(mine, peer) for peer in peers], [(theirs[p], p) for p in peers], 2)
        for turn in range(3):
            gpu.copy(gpu.put(part(group.rank, 50, turn)), mine)
            exchange.start()
            exchange.finish()
            kept = {peer: gpu.empty(50) for peer in peers}
            for peer in peers:
                gpu.copy(theirs[peer], kept[peer])
            gpu.copy(gpu.empty(50), mine)
            for peer in peers:
                assert np.array_equal(gpu.get(kept[peer]), part(peer, 50, turn))

    on_gpus(kind, 3, work)


def test_pinned_memory_is_used_again_when_its_copies_are_done():
    def work(group, gpu):
        made = []
        pinned = gpu.pinned
        gpu.pinned = lambda num_bytes: made.append(num_bytes) or pinned(num_bytes)
        room = gpu.empty(30_000)
        for _ in range(20):
            group.all_gather(gpu.put(part(group.rank, 15_000)), room, [15_000] * 2)
            gpu.get(room)
        return made

    for made in on_gpus("pinned", 2, work):
        assert made == [1 << 16, 1 << 16]
