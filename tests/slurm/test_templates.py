"""The batch scripts of slurm/, submitted to a real Slurm: each ends with the bytes of one rank without Slurm."""

import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster

TWO_NODES = ("--nodes=2", "--ntasks-per-node=2")


def write_program(path: Path, *lines: str) -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "template, launcher, mesh",
    [
        ("hpcinfer", "srun", "-tp 2"),
        ("hpcinfer", "mpirun", "-pp 2"),
        ("requeue", "srun", "-tp 4"),
        ("requeue", "mpirun", ""),
    ],
)
def test_one_job_runs_on_two_nodes(
    template: str, launcher: str, mesh: str, cluster: Cluster, prompts: Path, digest: str, tmp_path: Path
) -> None:
    settings = {"INPUT": str(prompts), "OPTIONS": mesh, "HPCINFER_LAUNCHER": launcher}
    job = cluster.submit(template, tmp_path, *TWO_NODES, **settings)
    ended = job.wait()
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.log
    assert "4 ranks" in ended.log
    assert job.digest() == digest


def test_each_rank_has_a_gpu(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    write_program(tmp_path / "bin/python", f'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" >>{seen}',
                  f'exec {sys.executable} "$@"')
    job = cluster.submit("gpu", tmp_path, "--nodes=2", INPUT=str(prompts), HPCINFER_VENV=str(tmp_path),
                         DEVICE="cpu")
    ended = job.wait()
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.log
    places = [line.split() for line in seen.read_text().splitlines()]
    assert len(places) == len({tuple(place) for place in places}) == 4
    assert {gpu for _, gpu in places} == {"0", "1"}
    assert job.digest() == digest


def test_helpers_share_the_work(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    array = cluster.submit("helpers", tmp_path, "--array=0-2", "--ntasks-per-node=1", INPUT=str(prompts))
    ended = [array.task(index).wait() for index in range(3)]
    assert {(each.state, each.exit_code) for each in ended} == {("COMPLETED", 0)}, ended
    worked = list((tmp_path / "completions.jsonl.job/parts").glob("*.jsonl"))
    assert len(worked) > 1, ended
    assert array.digest() == digest


def test_ranks_run_in_a_container(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    """A stand-in for Apptainer drops the container and runs what would be in it."""
    wanted = "exec --bind /here,/there --nv an.sif"
    write_program(tmp_path / "bin/apptainer", f'[ "$1 $2 $3 $4 $5" = "{wanted}" ] || exit 64', "shift 5",
                  f'PATH={sys.prefix}/bin:$PATH exec "$@"')
    job = cluster.submit("apptainer", tmp_path, *TWO_NODES, INPUT=str(prompts), IMAGE="an.sif",
                         HPCINFER_BINDS="/here,/there", HPCINFER_APPTAINER_FLAGS="--nv",
                         PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    ended = job.wait()
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.log
    assert "4 ranks" in ended.log
    assert job.digest() == digest
