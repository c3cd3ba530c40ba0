"""Arrays between ranks: NCCL where each has a GPU, the MPI where two share one; a job that loses a rank goes on."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from golden import DEMO_MODEL, demo_prompts, read_output, varied_rows, write_rows
from jobs import fault_tolerance, run_job, start_job, start_mpi, wait_until

RANK = Path(__file__).with_name("device_group_rank.py")


def run_ranks(ranks: int, ranks_per_gpu: int) -> list[str]:
    """Run a group; the transport of each rank."""
    done = start_mpi(ranks, [sys.executable, str(RANK), str(ranks_per_gpu)]).wait(120)
    assert done.rc == 0, done.stdout + done.stderr
    return done.stdout.split()


def needs_nccl() -> None:
    if not any(importlib.util.find_spec(name) for name in ("cupy", "nccl")):
        pytest.skip("neither cupy nor nccl4py is installed")


def test_ranks_that_share_a_gpu_go_through_the_mpi():
    assert run_ranks(2, 2) == ["staged"] * 2


def test_three_ranks_on_one_gpu():
    assert run_ranks(3, 3) == ["staged"] * 3


def test_nccl_between_two_gpus():
    needs_nccl()
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: NCCL refuses two ranks on it")
    assert run_ranks(2, 1) == ["nccl"] * 2


def test_nccl_with_one_rank(gpu):
    """The binding itself: a communicator of one, its sums and its end."""
    needs_nccl()
    from hpcinfer.comm.device.communicator import find_binding

    binding = find_binding()
    assert binding is not None
    torch.cuda.set_device(gpu)
    communicator = binding.join(1, 0, binding.new_id())
    source = torch.arange(1000, dtype=torch.float32, device=gpu)
    target, stream = torch.zeros_like(source), torch.cuda.current_stream()
    communicator.all_reduce(source.data_ptr(), target.data_ptr(), len(source), stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(source, target)
    communicator.abort()


@pytest.mark.time_limit(300)
def test_a_replica_that_loses_a_rank_goes_on_with_the_same_bytes(tmp_path):
    flags = fault_tolerance()
    rows = write_rows(tmp_path / "in.jsonl", varied_rows(demo_prompts(48) * 4))
    assert run_job(0, DEMO_MODEL, tmp_path / "store", module="hpcinfer.convert").rc == 0
    options = ("--model", tmp_path / "store", "--input", rows, "--device", "cuda", "--seed", "7")
    assert run_job(0, *options, "--output", tmp_path / "whole.jsonl", timeout=200).rc == 0
    shared = ("-tp", "3", "--ranks-per-gpu", "3", "--max-num-seqs", "1")  # slow enough to be hit
    job = start_job(3, *options, *shared, "--output", tmp_path / "hurt.jsonl", flags=flags)
    parts = tmp_path / "hurt.jsonl.job" / "parts"
    wait_until(lambda: any(path.stat().st_size for path in parts.glob("*")), timeout=120)
    assert job.kill_rank(2)
    done = job.wait(200)
    assert (tmp_path / "hurt.jsonl").exists(), done.stderr
    assert read_output(tmp_path / "hurt.jsonl").digest == read_output(tmp_path / "whole.jsonl").digest
