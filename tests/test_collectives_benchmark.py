"""The benchmark of collectives runs, and its tables say what was measured."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from jobs import mpi_environment, mpiexec_command
from sources import CHECKOUT

SCENE = "one node, 2 ranks"


@pytest.fixture
def report(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("collectives_report")


def test_one_node_is_measured(tmp_path: Path, report: ModuleType) -> None:
    mpiexec_command()  # or skip
    argv = [sys.executable, CHECKOUT / "benchmarks" / "collectives.py", "--only", SCENE, "--sizes", "1K", "64K",
            "--seconds", "0.02", "--rounds", "2", "--calibrate", "0.5", "--no-algorithms",
            "--json", tmp_path / "c.json"]  # fmt: skip
    run = subprocess.run(argv, capture_output=True, text=True, timeout=100, env={**os.environ, **mpi_environment()})
    assert run.returncode == 0, run.stderr
    assert f"### {SCENE}" in run.stdout and "| 64 KiB |" in run.stdout
    (scene,) = json.loads((tmp_path / "c.json").read_text())["scenes"]
    assert set(scene["calibration"]["shapes"]) == {"2"}
    assert [row.num_bytes for row in report.rows(scene)] == [1024, 65536]
    assert all(set(item["seconds"]) == {"mpi", "auto", "one_shot", "two_shot"} for item in scene["starts"][""]["rows"])


def test_ratios_are_medians_of_rounds_and_best_is_the_least_of_all_starts(report: ModuleType) -> None:
    seconds = {"mpi": [4.0, 9.0, 6.0], "auto": [2.0, 3.0, 3.0], "leader": [2.0, 3.0, 3.0], "one_shot": [1.0, 2.0, 6.0]}
    starts = {"": [seconds], "Open MPI, ring": [{"mpi": [3.0] * 3, "auto": [2.0] * 3}], "MPICH": [{"mpi": [5.0] * 3}]}
    rows = {name: {"rows": [{"num_bytes": 1024, "seconds": each, "choice": "leader"} for each in some]}
            for name, some in starts.items()}  # fmt: skip
    (row,) = report.rows({"scene": {"name": "x"}, "starts": rows})
    assert (row.default, row.best, row.best_name, row.mpich, row.auto) == (6.0, 3.0, "ring", 5.0, 3.0)
    assert (row.to_default, row.to_best, row.form_name, row.form) == (2.0, 1.5, "one_shot", 2.0)
    assert (row.behind, row.noise) == (0.5, 0.0)
    assert "| 1 KiB | 6,000,000 | 3,000,000 (ring) | 5,000,000 | 3,000,000 | leader | 2.00 × | 1.50 ×" in "\n".join(
        report.markdown({"scene": {"name": "x"}, "starts": rows}))  # fmt: skip
