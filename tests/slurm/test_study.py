"""`hpcinfer study --submit` on a real Slurm: a job for each number of nodes, then the table of all."""

import os
import sys
from pathlib import Path

from golden import DEMO_MODEL, EXAMPLES
from slurm_cluster import Cluster, SlurmJob

STUDY = [sys.executable, "-m", "hpcinfer", "study"]


def test_study_is_submitted_and_collected(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    prompts = EXAMPLES / "prompts.jsonl"
    asked = ["--model", DEMO_MODEL, "--input", prompts, "--rows", "8", "--nodes", "1,2", "--scaling", "strong",
             "--repeats", "1", "--mesh", "tp=node", "--ranks-per-node", "2"]  # fmt: skip
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
    said = cluster.call(*STUDY, "--output", folder, *asked, "--submit", "--sbatch-option=--time=2", cwd=tmp_path,
                        environment=environment)  # fmt: skip
    numbers = [word for word in said.split() if word.isdigit()]
    jobs = [SlurmJob(cluster, number, folder / "jobs") for number in numbers[-2:]]
    states = [job.wait(100).state for job in jobs]
    assert states == ["COMPLETED"] * 2, [path.read_text() for path in folder.glob("jobs/*")]
    table = cluster.call(*STUDY, "--output", folder, "--collect", cwd=tmp_path)
    assert "outputs of 8 rows: the same bytes in all runs" in table
    assert "nodes are hosts of one machine" in table and "failed" not in table
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[1].startswith("strong,tp=node,1,1,2,1,2,2,")
