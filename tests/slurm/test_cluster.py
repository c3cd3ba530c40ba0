"""slurm/cluster.sh: brings up what is missing, and leaves nothing behind."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster, environment_of, require_slurm
from sources import CHECKOUT


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for a socket."""
    require_slurm()
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        yield Path(folder)


def processes_of(folder: Path) -> list[psutil.Process]:
    """The cluster's daemons."""
    return [each for each in psutil.process_iter() if environment_of(each).get("SLURM_CONF") == f"{folder}/slurm.conf"]


def test_cluster_comes_up_once_and_goes_away(folder: Path) -> None:
    plugin = folder / "libpmix.so.2"
    plugin.touch()
    with Cluster(folder, 1, HPCINFER_CLUSTER_PMIX=str(plugin)) as cluster:
        assert (folder / "libpmix.so").readlink() == Path("libpmix.so.2")
        first = processes_of(folder)
        cluster.up()
        assert processes_of(folder) == first
        with pytest.raises(AssertionError, match="another one is up"):
            cluster.call(CHECKOUT / "slurm/cluster.sh", "up", "2")
    psutil.wait_procs(first, timeout=5)
    assert not processes_of(folder)
    assert {path.name for path in folder.iterdir()} == {"libpmix.so.2", "log", "slurm.conf", "gres.conf"}


def test_killed_node_comes_back(folder: Path) -> None:
    with Cluster(folder, 2) as cluster:
        killed = cluster.daemon("n1")
        cluster.kill_node("n1")
        assert not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE
        cluster.up()
        assert cluster.daemon("n1").is_running() and cluster.daemon("n1") != killed
        assert cluster.call("srun", "--nodes=2", "true") == ""


@pytest.mark.parametrize("arguments", [(), ("up",), ("up", "0"), ("up", "many"), ("down", "2")])
def test_usage(arguments: tuple[str, ...]) -> None:
    run = subprocess.run([CHECKOUT / "slurm/cluster.sh", *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "usage: slurm/cluster.sh up NODES | down\n")
