"""Jobs on GPUs as far as a CPU can play them: Triton's interpreter, and arrays between ranks by way of the MPI."""

import functools
import os
import sys
from pathlib import Path

import pytest
from golden import read_output, varied_rows, write_rows
from jobs import start_mpi
from models import make_tiny_model

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.time_limit(600)

RANK = Path(__file__).with_name("interpreted_rank.py")
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
TEXTS = ["The list of files is read line by line", "Return", "hello world, the quick", "def main("]
FLAGS = ("--device", "cuda", "--dtype", "float32", "--max-num-batched-tokens", "32")


@pytest.fixture(scope="module")
def digest_of(tmp_path_factory):
    """Runs a job on a mesh; gives the SHA-256 of its output."""
    folder = tmp_path_factory.mktemp("gpu")
    model = make_tiny_model(folder / "model", "llama", num_hidden_layers=2)
    rows = [{**row, "max_tokens": min(row["max_tokens"], 4), "min_tokens": 0} for row in varied_rows(TEXTS * 2)]
    prompts = write_rows(folder / "prompts.jsonl", rows)

    @functools.cache
    def run(mesh=(1, 1, 1), *flags):
        dp, pp, tp = mesh
        output = folder / f"{len(list(folder.iterdir()))}.jsonl"
        paths = ("--model", model, "--input", prompts, "--output", output)
        argv = [sys.executable, RANK, *paths, *FLAGS, "-dp", str(dp), "-pp", str(pp), "-tp", str(tp), *flags]
        done = start_mpi(dp * pp * tp, list(map(os.fspath, argv)), INTERPRETED).wait(300)
        assert done.rc == 0, done.stderr
        return read_output(output).digest

    return run


def test_sums_and_hidden_states_between_gpus_change_no_byte(digest_of):
    assert digest_of((1, 2, 2)) == digest_of()


def test_company_and_batches_in_flight_change_no_byte(digest_of):
    assert digest_of((1, 1, 1), "--micro-batches", "2", "--max-num-seqs", "2", "--block-size", "8") == digest_of()
