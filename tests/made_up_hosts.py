"""Virtual hosts: each has a network, a name and shared memory of its own; they share files."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import mpiexec_command
from sources import CHECKOUT

CLUSTER = CHECKOUT / "launch" / "virtual_cluster.sh"


class Hosts:
    """Some of them, called vh0, vh1 and so on."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "HPCINFER_CLUSTER": str(folder)}

    def __call__(self, *words: str) -> str:
        """Give a command to launch/virtual_cluster.sh; returns what it says."""
        run = subprocess.run([CLUSTER, *words], capture_output=True, text=True, env=self.environment, timeout=30)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    def mpiexec(self, ranks: str, *flags: str) -> list[str]:
        """The launcher for ranks on hosts, as vh0:2,vh1:3."""
        agent = ["--prtemca", "plm_ssh_agent", f"{CLUSTER} agent"]
        return [str(CLUSTER), "exec", "vh0", *mpiexec_command(), *agent, "--host", ranks, *flags]


@contextmanager
def virtual_hosts(folder: Path, number: int, delay_us: int = 20, mbit_per_s: int = 10000) -> Iterator[Hosts]:
    """Bring hosts up, for as long as the context lasts; skips the test where they cannot be."""
    hosts = Hosts(folder / "cluster")
    argv = [CLUSTER, "up", str(number), str(delay_us), str(mbit_per_s)]
    run = subprocess.run(argv, capture_output=True, text=True, env=hosts.environment, timeout=30)
    if run.returncode != 0:
        subprocess.run([CLUSTER, "down"], env=hosts.environment, timeout=30)
        pytest.skip(run.stderr.strip())
    try:
        yield hosts
    finally:
        hosts("down")
