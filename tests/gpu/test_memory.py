"""Too little memory on the GPU: an answer in pieces, or an error that says so, and no crash."""

import subprocess
import sys
import time

import pytest
import torch
from golden import DEMO_MODEL, assert_refused, demo_prompts, varied_rows, write_rows
from gpu_replicas import RandomStore, generate, llama, random_prompts
from jobs import run_job

from hpcinfer.config import SamplingParams
from hpcinfer.errors import ConfigError

MIB = 1 << 20
HOLDER = """
import sys, torch
left = int(sys.argv[1])
held = []
while (free := torch.cuda.mem_get_info()[0]) > left + (64 << 20):
    held.append(torch.empty((free - left) // 2, dtype=torch.uint8, device="cuda"))
print("full", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def free_memory():
    """Gives back what earlier tests have left with torch."""
    torch.cuda.empty_cache()


@pytest.fixture
def fill():
    """Has another process hold all memory of the GPU but so many bytes, until the test ends."""
    holders = []

    def start(left):
        argv = [sys.executable, "-c", HOLDER, str(left)]
        holders.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert holders[-1].stdout.readline() == "full\n"

    yield start
    for each in holders:
        each.communicate("")


def test_a_cache_larger_than_the_memory_is_refused(make):
    config, size = llama(), torch.cuda.mem_get_info()[1]
    store, prompts = RandomStore(config, "bfloat16"), random_prompts(config, (5,))
    with pytest.raises(ConfigError, match="--kv-cache-memory"):
        generate(make(), store, prompts, SamplingParams(max_tokens=1), kv_cache_memory=f"{size // MIB + 1024}MiB")


@pytest.mark.time_limit(300)
def test_a_step_that_does_not_fit_is_computed_in_pieces(make, free_memory, caplog):
    config = llama()
    store, prompts = RandomStore(config, "bfloat16"), random_prompts(config, (1500,) * 20)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    limits = {"max_num_batched_tokens": 32768, "kv_cache_memory": "256MiB", "cache": "bfloat16"}
    whole = generate(make(), store, prompts, params, **limits)
    assert "in pieces" not in caplog.text
    torch.cuda.empty_cache()
    room = torch.cuda.memory_allocated() + 1024 * MIB  # products of 30,000 tokens alone need 360 MiB
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        assert generate(make(), store, prompts, params, **limits) == whole
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "in pieces" in caplog.text


@pytest.mark.time_limit(300)
def test_a_gpu_that_others_fill_is_refused_in_seconds(tmp_path, fill):
    rows = write_rows(tmp_path / "in.jsonl", varied_rows(demo_prompts(2)))
    assert run_job(0, DEMO_MODEL, tmp_path / "store", module="hpcinfer.convert").rc == 0
    fill(256 * MIB)
    begin = time.monotonic()
    run = run_job(0, "--model", tmp_path / "store", "--device", "cuda", "--input", rows, "--output", tmp_path / "out")
    assert_refused(run, "ConfigError", "nvidia-smi")
    assert time.monotonic() - begin < 60


@pytest.mark.time_limit(300)
def test_a_hidden_gpu_is_refused(tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", varied_rows(demo_prompts(2)))
    options = ("--model", DEMO_MODEL, "--device", "cuda", "--input", rows, "--output", tmp_path / "out")
    run = run_job(0, *options, env={"CUDA_VISIBLE_DEVICES": "", "HPCINFER_CACHE": str(tmp_path)})
    assert_refused(run, "ConfigError", "GPU", "--device cpu")
