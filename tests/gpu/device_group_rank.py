"""One rank of a group of GPUs: every way of moving arrays, against numpy. Usage: device_group_rank.py RANKS_PER_GPU."""

import sys

import numpy as np
import torch

from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.comm.device.opening import open_device_group
from hpcinfer.comm.world import start_world
from hpcinfer.kernels.gpu.arrays import GpuArrays
from hpcinfer.kernels.gpu.device import own_device

COUNTS = (5, 100_003, 64, 7)  # of the ranks


def part(rank: int) -> np.ndarray:
    """What a rank contributes."""
    return np.random.default_rng(rank).standard_normal(COUNTS[rank % 4]).astype(np.float32)


def main() -> None:
    """Move arrays; an assertion ends the job."""
    world, sharers = start_world(), int(sys.argv[1])
    device = own_device(world.rank, world.size, sharers)
    group = open_device_group(world, GpuArrays(device))
    counts = [len(part(rank)) for rank in range(world.size)]
    everything = np.concatenate([part(rank) for rank in range(world.size)])
    for _ in range(20):
        mine, whole = torch.from_numpy(part(world.rank)).to(device), torch.empty(sum(counts), device=device)
        group.all_gather(mine, whole, counts)
        assert np.array_equal(whole.cpu().numpy(), everything), "all_gather"
        peer = (world.rank + 1) % world.size
        if world.size > 1:
            before = (world.rank - 1) % world.size
            room = torch.empty(counts[before], device=device)
            ring = group.prepare_exchange([(mine, peer)], [(room, before)], 5)  # a send of NCCL waits for its receiver
            ring.start()
            ring.finish()
            assert np.array_equal(room.cpu().numpy(), part(before)), "send and receive"
    group.check()
    print("nccl" if isinstance(group, NcclGroup) else "staged", flush=True)
    group.close()


if __name__ == "__main__":
    main()
