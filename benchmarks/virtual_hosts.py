"""Hosts out of namespaces (launch/virtual_cluster.sh), as long as a benchmark runs, and how MPI jobs start there."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "virtual_cluster.sh"
_SETTINGS = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
}
_AS_ROOT = [f"{name}{end}" for name in ("PRTE_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT") for end in ("", "_CONFIRM")]


def environment() -> dict[str, str]:
    """Settings for many ranks on few cores."""
    return {**_SETTINGS, **dict.fromkeys(_AS_ROOT if os.geteuid() == 0 else [], "1")}


def mpiexec() -> str:
    """The launcher of the MPI that is used: $HPCINFER_MPIRUN, the one beside Python, or the one on PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    return os.environ.get("HPCINFER_MPIRUN") or (str(beside) if beside.exists() else shutil.which("mpiexec") or "")


def mpiexec_on_hosts() -> list[str]:
    """The same on the first virtual host, able to start ranks on the others; the hosts are to be named."""
    return [os.fspath(_SCRIPT), "exec", "vh0", mpiexec(), "--prtemca", "plm_ssh_agent", f"{_SCRIPT} agent"]


class Cluster:
    """Virtual hosts, as long as the benchmark runs."""

    def __init__(self, num_hosts: int, folder: Path, link: tuple[int, int] = (100, 1000)) -> None:
        """Bring them up.

        Args:
            num_hosts: how many.
            folder: for the state of the cluster.
            link: of each host: delay in µs, Mbit/s.

        Raises:
            OSError: that is not possible here; with the reason.
        """
        self.num_hosts, self._environment = num_hosts, {**os.environ, "HPCINFER_CLUSTER": os.fspath(folder)}
        try:
            self.tell("up", str(num_hosts), *map(str, link))
        except OSError:
            self.close()
            raise

    @property
    def environment(self) -> Mapping[str, str]:
        """What launchers need to find it."""
        return {"HPCINFER_CLUSTER": self._environment["HPCINFER_CLUSTER"]}

    def tell(self, *words: str) -> None:
        """Give a command to launch/virtual_cluster.sh.

        Raises:
            OSError: it failed.
        """
        run = subprocess.run([_SCRIPT, *words], capture_output=True, text=True, env=self._environment, timeout=60)
        if run.returncode != 0:
            raise OSError(run.stderr.strip().partition("\n")[0].removeprefix("launch/virtual_cluster.sh: "))

    def close(self) -> None:
        """End all hosts and what runs there."""
        subprocess.run([_SCRIPT, "down"], capture_output=True, env=self._environment, timeout=60)
