"""The benchmarks run, their tables say something, and their counts are right."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from jobs import mpi_environment, mpiexec_command
from sources import CHECKOUT
from stages import native_was_built

MODULES = ("contenders", "operations", "random_model", "results", "rounds", "workload")


class Benchmarks(NamedTuple):
    """Modules of the benchmarks, which are programs and not a package."""

    contenders: ModuleType
    operations: ModuleType
    random_model: ModuleType
    results: ModuleType
    rounds: ModuleType
    workload: ModuleType


@pytest.fixture(scope="module")
def benchmarks(benchmark_module: Callable[[str], ModuleType]) -> Benchmarks:
    return Benchmarks(*map(benchmark_module, MODULES))


def run_benchmark(name: str, *arguments: "str | Path") -> str:
    """Run one benchmark and return what it prints."""
    argv = [sys.executable, CHECKOUT / "benchmarks" / name, *arguments]
    environment = {**os.environ, **mpi_environment()}
    environment.pop("HPCINFER_PEERS", None)
    run = subprocess.run(argv, capture_output=True, text=True, timeout=110, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_throughput_measures_equal_outputs(tmp_path: Path) -> None:
    mpiexec_command()  # or skip
    size = ["--random", "tiny", "--prompts", "4", "--output-tokens", "4"]
    where = ["--dir", tmp_path, "--json", tmp_path / "result.json"]
    table = run_benchmark("throughput.py", *size, "--rounds", "1", "--contenders", "f32:1x1x2:1", *where)
    result = json.loads((tmp_path / "result.json").read_text())
    assert "hpcinfer 1x1x2, f32" in table
    assert result["is_right"] and result["num_outputs"] == {"f32": 1}
    assert all(item["total_tokens_per_s"] > item["output_tokens_per_s"] > 0 for item in result["contenders"])
    assert all(0 < item["roofline"] < 1 and item["peak_bytes"] > 2**20 for item in result["contenders"])
    (seconds,) = [item["seconds"] for item in result["breakdowns"]]
    assert min(seconds["Python around kernels"], seconds["communication"], seconds["sampling"]) > 0
    assert (seconds["products"] > 0) == native_was_built()  # only those measure themselves
    assert result["missing_peers"] == [peer for peer in ("transformers", "openvino", "vllm", "llama.cpp")
                                       if peer != "transformers" or not importlib.util.find_spec("transformers")]
    if importlib.util.find_spec("transformers"):
        assert result["agreement"]["clear"] == result["agreement"]["clear_equal"] > 0
        assert [item["to_best_peer"] is not None for item in result["contenders"]] == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_reading_a_store_is_measured_beside_others(tmp_path: Path) -> None:
    table = run_benchmark("loading_reads.py", "--shape", "tiny", "--rounds", "2", "--dir", tmp_path)
    rows = {line[:32].strip(): line[32:].split() for line in table.splitlines() if line[32:].strip()}
    assert all(float(rows[name][0]) > 0 for name in ("hpcinfer", "hpcinfer, O_DIRECT", "h5py, dataset[...]"))
    assert "left out" in table and "fio, O_DIRECT" not in rows  # there is none, or it wants larger files
    assert not list(tmp_path.iterdir())


def test_loading_is_measured_beside_a_loader_that_reads_alone(tmp_path: Path) -> None:
    mpiexec_command()
    size = ("--replicas", "1,2", "--shape", "tiny", "--mb-per-s", "2")
    run_benchmark("loading.py", *size, "--dir", tmp_path, "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    asked = {(row["way"], row["replicas"]): row["jobs"][0]["asked"] / result["store"] for row in result["rows"]}
    assert all(0.9 < asked["together", number] < 1.1 for number in (1, 2))
    assert asked["each alone", 2] > 1.8
    assert all(job["first_token_s"] > 0 for row in result["rows"] for job in row["jobs"])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_jobdir_measures_every_phase(tmp_path: Path) -> None:
    table = run_benchmark("jobdir.py", "--rows", "3000", "--dir", tmp_path)
    assert table.startswith("3000 rows, 1 ranks\n")
    assert all(phase in table for phase in ("index", "resume, half done", "merge"))
    assert not list(tmp_path.iterdir())


def test_linear_size_counts_the_matrices_of_a_model(benchmarks: Benchmarks) -> None:
    shape = benchmarks.random_model.SHAPES["tiny"]
    tensors = benchmarks.random_model._tensors(shape, np.random.default_rng(0))
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name}
    head = matrices.pop("lm_head.weight")
    size = benchmarks.operations.linear_size(shape.__dict__)
    assert size.weights == sum(matrix.size for matrix in matrices.values())
    assert size.outputs == sum(len(matrix) for matrix in matrices.values())
    assert (size.head_weights, size.head_outputs) == (head.size, len(head))


def test_operations_count_a_shared_prefix_once(benchmarks: Benchmarks) -> None:
    size = benchmarks.operations.LinearSize(weights=10, outputs=0, head_weights=7, head_outputs=0)
    prompts = [[1, 2, 3], [1, 2, 4, 5]]
    apart, together = (benchmarks.workload.Workload(prompts, 3, prefix) for prefix in (0, 2))
    assert size.operations(apart) == 2 * ((3 + 4 + 2 * 2) * 10 + 2 * 3 * 7)
    assert size.operations(together) == size.operations(apart) - 2 * 2 * 10


def test_bytes_per_token_count_weights_and_scales(benchmarks: Benchmarks) -> None:
    size = benchmarks.operations.LinearSize(weights=64, outputs=3, head_weights=32, head_outputs=2)
    assert size.bytes_per_token("f32") == 96 * 4
    assert size.bytes_per_token("int8") == 96 + 5 * 4
    assert size.bytes_per_token("int4") == 96 / 2 + 96 / 32 * 2


def test_one_sequence_alone_is_bound_by_memory(benchmarks: Benchmarks) -> None:
    size = benchmarks.operations.LinearSize(weights=100, outputs=0, head_weights=0, head_outputs=0)
    peaks = benchmarks.results.Peaks(f32=1000.0, int8=4000.0, read=10.0)
    alone, two = (benchmarks.workload.Workload([[1]] * count, 5, 0) for count in (1, 2))
    assert benchmarks.results.least_seconds(peaks, "f32", alone, size) == 5 * 400 / 10
    assert benchmarks.results.least_seconds(peaks, "f32", two, size) == 2 * 10 * 100 / 1000
    assert benchmarks.results.least_seconds(peaks, "int4", two, size) == 2 * 10 * 100 / 4000


def test_ratios_and_fractions_are_medians_over_rounds(benchmarks: Benchmarks) -> None:
    contenders, results = benchmarks.contenders, benchmarks.results
    rounds = benchmarks.rounds.Rounds(None, [], [])
    job = contenders.parse_job("f32:1x1x1:2")
    slow, fast, other = (contenders.PeerContender(*peer, threads=2) for peer in
                         (("vllm", "f32"), ("openvino", "f32"), ("openvino", "int8")))  # fmt: skip
    seconds = {job: [1.0, 2.0, 4.0], slow: [9.0, 9.0, 9.0], fast: [3.0, 4.0, 6.0], other: [0.1, 0.1, 0.1]}
    for contender, values in seconds.items():
        rounds.runs[contender] = [benchmarks.rounds.Run(value, 0) for value in values]
    rounds.peaks = [{2: results.Peaks(f32=peak, int8=1.0, read=1.0)} for peak in (100.0, 100.0, 50.0, 50.0)]
    size = benchmarks.operations.LinearSize(weights=25, outputs=0, head_weights=0, head_outputs=0)
    workload = benchmarks.workload.Workload([[1], [1]], 1, 0)
    result = results.contender_results(rounds, workload, size)[-1]
    assert result["to_best_peer"] == 2.0  # of 3, 2 and 1.5
    assert result["roofline"] == 0.5  # of 1, 1 / 2 and 2 / 4
    assert result["output_tokens_per_s"] == 1.0


def test_contenders_are_read_from_the_command_line(benchmarks: Benchmarks) -> None:
    job = benchmarks.contenders.parse_job("int8:2x1x3:4:no-prefix-reuse:kv-cache-dtype=int8")
    assert (job.precision, job.mesh.ranks, job.threads) == ("int8", 6, 24)
    assert job.engine == "hpcinfer 2x1x3 no-prefix-reuse kv-cache-dtype=int8"
    assert job.answer == "int8 kv-cache-dtype=int8"
    assert job.flags == ["--no-prefix-reuse", "--kv-cache-dtype=int8"]
    assert benchmarks.contenders.parse_job("f32:1x1x1:2:no-prefix-reuse").answer == "f32"
    peer = benchmarks.contenders.parse_peer("llama.cpp:int8:no-prefix-reuse")
    assert (peer.peer, peer.precision, peer.reuses_prefixes) == ("llama.cpp", "int8", False)


@pytest.mark.parametrize("text", ["f32", "f32:1x1:2", "f32:1x1x1", "f32:1x1x1:0", "int3:1x1x1:1", "f32:axbxc:1"])
def test_wrong_jobs_are_refused(benchmarks: Benchmarks, text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=text):
        benchmarks.contenders.parse_job(text)


@pytest.mark.parametrize("text", ["openvino", "vllm:int8", "nobody:f32", "vllm:f32:fast"])
def test_wrong_peers_are_refused(benchmarks: Benchmarks, text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=text):
        benchmarks.contenders.parse_peer(text)


def test_prompts_share_the_prefix_and_nothing_else(benchmarks: Benchmarks) -> None:
    class Numbers:
        """A tokenizer whose tokens are all different."""

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return list(range(5000))

    recipe = benchmarks.workload.Recipe(20, (3, 5), 7, prefix_tokens=11)
    workload = benchmarks.workload.make_workload(Numbers(), recipe)
    assert {tuple(prompt[:11]) for prompt in workload.prompts} == {tuple(range(11))}
    assert {len(prompt) for prompt in workload.prompts} == {14, 15, 16}
    assert len({prompt[11] for prompt in workload.prompts}) > 15
    assert workload.all_output_tokens == 140
