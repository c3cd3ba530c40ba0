"""A real Slurm of several nodes on this machine, as slurm/cluster.sh makes it, and batch jobs of slurm/ on it."""

import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from golden import DEMO_MODEL
from jobs import JobTimeoutError, kill_processes
from sources import CHECKOUT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin"
SETTINGS = ("HPCINFER_CLUSTER", "HPCINFER_SRUN", "HPCINFER_MPIRUN", "HPCINFER_THREADS", "OUTPUT", "OPTIONS")
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


class EndedJob(NamedTuple):
    """How a job ended."""

    state: str
    exit_code: int
    restarts: int
    log: str


class Cluster:
    """A cluster in a folder of its own, up within a `with`; its nodes are called n0, n1, ..."""

    def __init__(self, folder: Path, num_nodes: int, **environment: str) -> None:
        self._folder, self._num_nodes = folder, num_nodes
        self._environment = {
            **_without(os.environ, "SLURM", "SBATCH", *SETTINGS),
            "PATH": SEARCH_PATH,
            "SLURM_CONF": f"{folder}/slurm.conf",
            "HPCINFER_CLUSTER_DIR": str(folder),
            "HPCINFER_CLUSTER_PORT": str(_free_ports(num_nodes + 1)),
            "HPCINFER_ROOT": str(CHECKOUT),
            "HPCINFER_VENV": sys.prefix,
            "HPCINFER_CACHE": f"{folder}/cache",
            "MODEL": str(DEMO_MODEL),
            **environment,
        }

    def __enter__(self) -> "Cluster":
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def up(self) -> None:
        """Start what does not run."""
        self.call(CHECKOUT / "slurm/cluster.sh", "up", str(self._num_nodes))

    def down(self) -> None:
        """End everything."""
        self.call(CHECKOUT / "slurm/cluster.sh", "down")

    def call(self, *argv: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Run a command that must succeed, and return what it says."""
        run = subprocess.run(argv, env={**self._environment, **(environment or {})}, cwd=cwd, timeout=60, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert run.returncode == 0, f"{argv}\n{run.stdout}"
        return run.stdout.strip()

    def submit(self, template: str, folder: Path, *options: str, **environment: str) -> "SlurmJob":
        """Submit a batch script of slurm/ in a folder, which gets its log and its output."""
        folder.mkdir(exist_ok=True)
        script = CHECKOUT / f"slurm/{template}.sbatch"
        job_id = self.call("sbatch", "--parsable", *options, script, cwd=folder, environment=environment)
        return SlurmJob(self, job_id, folder)

    def daemon(self, node: str) -> psutil.Process:
        """The slurmd of a node."""
        return psutil.Process(int((self._folder / f"run/slurmd.{node}.pid").read_text()))

    def kill_node(self, node: str) -> None:
        """Send SIGKILL to a node's daemon and all that it started, as if the power went off."""
        there = {"SLURM_CONF": self._environment["SLURM_CONF"], "SLURMD_NODENAME": node}
        tasks = [process for process in psutil.process_iter() if there.items() <= environment_of(process).items()]
        managers = [parent for task in tasks for parent in task.parents() if parent.name() == "slurmstepd"]
        kill_processes([self.daemon(node), *managers, *tasks])


class SlurmJob:
    """A submitted job, or a task of a job array."""

    def __init__(self, cluster: Cluster, job_id: str, folder: Path) -> None:
        self._cluster, self.job_id, self._folder = cluster, job_id, folder

    @property
    def log(self) -> str:
        """What the job has written so far."""
        path = self._folder / f"hpcinfer-{self.job_id}.out"
        return path.read_text() if path.exists() else ""

    def task(self, index: int) -> "SlurmJob":
        """A task of this job array."""
        return SlurmJob(self._cluster, f"{self.job_id}_{index}", self._folder)

    def fields(self) -> dict[str, str]:
        """What Slurm knows of the job."""
        words = self._cluster.call("scontrol", "--oneliner", "show", "job", self.job_id).split()
        return dict(word.partition("=")[::2] for word in words)

    def nodes(self) -> list[str]:
        """Names of its nodes; the batch script runs on the first one."""
        return self._cluster.call("scontrol", "show", "hostnames", self.fields()["NodeList"]).split()

    def signal(self, *options: str) -> None:
        """Cancel the job, or send it a signal."""
        self._cluster.call("scancel", *options, self.job_id)

    def wait(self, timeout: float = 60) -> EndedJob:
        """Wait for the end.

        Raises:
            JobTimeoutError: the job did not end within `timeout` seconds; it was cancelled.
        """
        end = time.monotonic() + timeout
        while (fields := self.fields())["JobState"] not in ENDED:
            if time.monotonic() > end:
                self.signal("--full", "--signal=KILL")
                self.signal()
                raise JobTimeoutError(f"{fields['JobState']} after {timeout} s\n{self.log}")
            time.sleep(0.2)
        exit_code = int(fields["ExitCode"].partition(":")[0])
        return EndedJob(fields["JobState"], exit_code, int(fields["Restarts"]), self.log)

    def digest(self) -> str:
        """SHA-256 of the output."""
        return hashlib.sha256((self._folder / "completions.jsonl").read_bytes()).hexdigest()

    def ranks(self) -> list[psutil.Process]:
        """The MPI ranks of the job."""
        return [process for process in psutil.process_iter() if _is_rank(process, self.job_id)]


def require_slurm() -> None:
    """Skip the test where Slurm is not installed."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH_PATH)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: scripts/install-slurm installs Slurm as root on Debian")


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Environment of a process; empty when it is gone or not ours."""
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


def _is_rank(process: psutil.Process, job_id: str) -> bool:
    environment = environment_of(process)
    try:
        is_of_mpi = "python" in process.name() and bool({"PMIX_RANK", "PMI_RANK"} & environment.keys())
        return is_of_mpi and environment.get("SLURM_JOB_ID") == job_id
    except psutil.NoSuchProcess:
        return False


def _without(environment: Mapping[str, str], *prefixes: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(prefixes)}


def _free_ports(count: int) -> int:
    """First of so many ports that nobody listens at, below those that the kernel gives out."""
    first = random.SystemRandom().randrange(17000, 32000 - count)
    taken = [port for port in range(first, first + count) if _is_taken(port)]
    return _free_ports(count) if taken else first


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
