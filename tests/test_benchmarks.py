"""The benchmarks run, and their tables say something."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import mpi_environment, mpiexec_command
from sources import CHECKOUT


def run_benchmark(name: str, *arguments: "str | Path") -> str:
    """Run one benchmark and return what it prints."""
    argv = [sys.executable, CHECKOUT / "benchmarks" / name, *arguments]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=110, env={**os.environ, **mpi_environment()})
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_throughput_measures_equal_outputs(tmp_path: Path) -> None:
    mpiexec_command()  # or skip
    size = ["--random", "tiny", "--prompts", "4", "--output-tokens", "4"]
    where = ["--dir", tmp_path, "--json", tmp_path / "result.json"]
    table = run_benchmark("throughput.py", *size, "--rounds", "1", "--meshes", "1x1x2", *where)
    result = json.loads((tmp_path / "result.json").read_text())
    assert "hpcinfer 1x1x2" in table
    assert result["is_right"]
    assert all(item["total_tokens_per_s"] > item["output_tokens_per_s"] > 0 for item in result["contenders"])
    seconds = result["breakdowns"]["1x1x2"]
    assert min(seconds["products"], seconds["attention"], seconds["communication"], seconds["sampling"]) > 0
    if importlib.util.find_spec("transformers"):
        assert result["agreement"]["clear"] == result["agreement"]["clear_equal"] > 0
        assert [item["ratio"] is not None for item in result["contenders"]] == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_jobdir_measures_every_phase(tmp_path: Path) -> None:
    table = run_benchmark("jobdir.py", "--rows", "3000", "--dir", tmp_path)
    assert table.startswith("3000 rows, 1 ranks\n")
    assert all(phase in table for phase in ("index", "resume, half done", "merge"))
    assert not list(tmp_path.iterdir())
