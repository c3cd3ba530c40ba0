"""A job on a real Slurm ends before its work does: time limit, signal, scancel, a node without power."""

import signal
from pathlib import Path

import psutil
import pytest
from jobs import kill_processes, wait_until
from slurm_cluster import Cluster, SlurmJob

SLOWLY = "--max-num-seqs 1"  # so that there is time to end it; changes no result
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def num_finished(folder: Path) -> int:
    """Rows in the journal."""
    parts = Path(folder, "completions.jsonl.job/parts").glob("*.sidecar")
    return sum((path.stat().st_size - 32) // 32 for path in parts)


def suspend(job: SlurmJob) -> list[psutil.Process]:
    """Stop the ranks that a job has now."""
    ranks = job.ranks()
    for rank in ranks:
        rank.suspend()
    return ranks


def hold(job: SlurmJob, folder: Path) -> list[psutil.Process]:
    """Stop the two ranks of a job in the middle of its work."""
    wait_until(lambda: num_finished(folder) > 0)
    wait_until(lambda: len(suspend(job)) == 2)
    assert not (folder / "completions.jsonl").exists(), job.log
    return job.ranks()


def release(ranks: list[psutil.Process]) -> None:
    """Let them go on."""
    for rank in ranks:
        rank.resume()


def is_told_to_stop(process: psutil.Process) -> bool:
    """Whether SIGUSR1 or SIGTERM waits for a process that is stopped."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    waiting = int(status["ShdPnd"], 16)
    return any(waiting >> (number - 1) & 1 for number in (signal.SIGUSR1, signal.SIGTERM))


def test_cancelled_job_goes_on_with_another_number_of_nodes(
    cluster: Cluster, prompts: Path, digest: str, tmp_path: Path
) -> None:
    job = cluster.submit("requeue", tmp_path, *TWO_NODES, INPUT=str(prompts), OPTIONS=SLOWLY)
    hold(job, tmp_path)
    job.signal()
    assert job.wait().state == "CANCELLED"
    assert not (tmp_path / "completions.jsonl").exists()
    again = cluster.submit("requeue", tmp_path, "--nodes=3", "--ntasks-per-node=1", INPUT=str(prompts))
    ended = again.wait()
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), ended.log
    assert job.digest() == digest


@pytest.mark.time_limit(180)
def test_job_at_its_time_limit_starts_again(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    limit = ("--time=1", "--signal=B:USR1@55")
    job = cluster.submit("requeue", tmp_path, *TWO_NODES, *limit, INPUT=str(prompts), OPTIONS=SLOWLY)
    ranks = hold(job, tmp_path)
    wait_until(lambda: all(map(is_told_to_stop, ranks)), 50)
    release(ranks)
    ended = job.wait(100)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.log
    assert ended.restarts > 0
    assert job.digest() == digest


def test_signal_stops_jobs_that_start_again(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    jobs = []
    for template, launcher in (("requeue", "srun"), ("requeue", "mpirun"), ("supervise", "srun")):
        folder = tmp_path / f"{template}-{launcher}"
        settings = {"INPUT": str(prompts), "OPTIONS": SLOWLY, "HPCINFER_LAUNCHER": launcher}
        jobs.append(cluster.submit(template, folder, *TWO_NODES, **settings))
        ranks = hold(jobs[-1], folder)
        jobs[-1].signal("--batch", "--signal=USR1")
        wait_until(lambda ranks=ranks: all(map(is_told_to_stop, ranks)), 20)
        release(ranks)
    for job in jobs:
        ended = job.wait()
        assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.log
        assert job.digest() == digest


def test_preempted_job_starts_again_once(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    """The job ends in its grace time, which is longer than we wait; Slurm puts it back, and so would the job itself."""
    job = cluster.submit("requeue", tmp_path, *TWO_NODES, INPUT=str(prompts), OPTIONS=SLOWLY)
    hold(job, tmp_path)
    cluster.call("sbatch", "--partition=urgent", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=true")
    ended = job.wait(80)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.log
    assert job.digest() == digest


def test_stopped_job_can_be_resumed(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    job = cluster.submit("hpcinfer", tmp_path, *TWO_NODES, INPUT=str(prompts), OPTIONS=SLOWLY)
    ranks = hold(job, tmp_path)
    job.signal("--signal=USR1")
    release(ranks)
    ended = job.wait()
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 75, 0), ended.log
    ended = cluster.submit("hpcinfer", tmp_path, INPUT=str(prompts)).wait()
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.log
    assert job.digest() == digest


@pytest.mark.time_limit(180)
def test_lost_node_ends_no_job(cluster: Cluster, prompts: Path, digest: str, tmp_path: Path) -> None:
    """Both jobs lose it at once, since Slurm takes a while to notice: one is put back, the other goes on without."""
    settings = {"INPUT": str(prompts), "OPTIONS": SLOWLY}
    put_back = cluster.submit("requeue", tmp_path / "requeue", *TWO_NODES, **settings)
    hold(put_back, tmp_path / "requeue")
    nodes = put_back.nodes()
    there = f"--nodelist={','.join(nodes)}"
    supervised = cluster.submit("supervise", tmp_path / "supervise", *TWO_NODES, there, **settings)
    ranks = hold(supervised, tmp_path / "supervise")
    cluster.kill_node(nodes[-1])
    release([rank for rank in ranks if rank.is_running()])
    try:
        for job, restarts in ((supervised, 0), (put_back, 1)):
            ended = job.wait(100)
            assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, restarts), ended.log
            assert job.digest() == digest
    finally:
        cluster.up()


def test_dead_rank_ends_no_job_where_mpi_tolerates_it(
    cluster: Cluster, prompts: Path, digest: str, tmp_path: Path
) -> None:
    settings = {"INPUT": str(prompts), "OPTIONS": f"-tp 2 {SLOWLY}", "HPCINFER_LAUNCHER": "mpirun"}
    job = cluster.submit("hpcinfer", tmp_path, *TWO_NODES, **settings, HPCINFER_MPIRUN_FLAGS="--with-ft ulfm")
    ranks = hold(job, tmp_path)
    kill_processes(ranks[1:])
    release(ranks[:1])
    ended = job.wait()
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), ended.log
    assert job.digest() == digest
