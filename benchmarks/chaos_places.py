"""Places where jobs can be hurt: this machine, virtual hosts, a small file system; and what of it there is here."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from contenders import Mesh
from virtual_hosts import Cluster, environment, mpiexec, mpiexec_on_hosts

_SMALL = "24m"  # the file system that gets full
# Without the detector nobody notices a silent host for 13 s, and ranks on busy cores are silent for a second or two;
# without the propagator the survivors cannot shrink.
_DETECTOR = {
    "mpi_ft_detector": "true",
    "mpi_ft_detector_period": "0.5",
    "mpi_ft_detector_timeout": "4",
    "mpi_ft_propagator_with_rbcast": "true",
}


class Launch(NamedTuple):
    """How a job is started."""

    is_tolerant: bool = False  # under an MPI that survives the death of a rank
    on_hosts: bool = False  # one rank on each virtual host
    is_supervised: bool = False
    num_spares: int = 0  # ranks that wait for a death

    def argv(self, mesh: Mesh, arguments: list[str]) -> list[str]:
        """Make the command line of a job."""
        if self.is_supervised:
            return [sys.executable, "-m", "hpcinfer.supervise", *_mesh_flags(mesh), *arguments]
        tolerant = ["--with-ft", "ulfm"] if self.is_tolerant else []
        where = _on_hosts(mesh, self.is_tolerant) if self.on_hosts else [mpiexec(), "--oversubscribe"]
        launcher = [*where, *tolerant, "--bind-to", "none", "-n", str(mesh.ranks + self.num_spares)]
        spares = ["--spare-ranks", str(self.num_spares)] if self.num_spares else []
        return [*launcher, sys.executable, "-m", "hpcinfer.run", *_mesh_flags(mesh), *spares, *arguments]


def _mesh_flags(mesh: Mesh) -> list[str]:
    return ["-dp", str(mesh.dp), "-pp", str(mesh.pp), "-tp", str(mesh.tp)]


def _on_hosts(mesh: Mesh, is_tolerant: bool) -> list[str]:
    hosts = ",".join(f"vh{i}:1" for i in range(mesh.ranks))
    detector = [text for name, value in _DETECTOR.items() for text in ("--mca", name, value)] if is_tolerant else []
    return [*mpiexec_on_hosts(), "--host", hosts, *detector]


class SmallDisk:
    """A file system of some megabytes in memory, that can be filled."""

    def __init__(self, folder: Path) -> None:
        """Mount it.

        Raises:
            OSError: that is not possible here; with the reason.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="small-disk-", dir=folder))
        argv = ["mount", "-t", "tmpfs", "-o", f"size={_SMALL}", "tmpfs", os.fspath(self.folder)]
        run = subprocess.run(argv, capture_output=True, text=True)
        if run.returncode != 0:
            self.folder.rmdir()
            raise OSError(run.stderr.strip())

    def fill(self) -> None:
        """Leave no room."""
        with (self.folder / "filler").open("ab", buffering=0) as filler:
            for size in (1 << 20, 1 << 12):
                while _can_write(filler.fileno(), size):
                    pass

    def make_room(self) -> None:
        """Take the filler away."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "--lazy", os.fspath(self.folder)], capture_output=True)
        self.folder.rmdir()


def _can_write(descriptor: int, size: int) -> bool:
    try:
        return os.write(descriptor, bytes(size)) == size
    except OSError:
        return False


@dataclass(frozen=True)
class Places:
    """Where jobs run, and where they write."""

    folder: Path
    cache: Path  # for the converted model
    leftovers: Path  # of killed launchers
    shared_memory: Path  # of ranks, killed ones too
    cluster: Cluster | None = None
    disk: SmallDisk | None = None

    def variables(self, launch: Launch) -> Mapping[str, str]:
        """Environment of a job."""
        names = {"HPCINFER_CACHE": str(self.cache), "TMPDIR": str(self.leftovers)}
        if launch.on_hosts and self.cluster:
            return {**environment(), **names, **self.cluster.environment}
        return {**environment(), **names, "OMPI_MCA_btl_sm_backing_directory": str(self.shared_memory)}

    @contextlib.contextmanager
    def opened(self, folder: Path) -> Iterator[Path]:
        """Make the folder of a round, and remove it with all that killed processes have left."""
        paths = (folder, self.leftovers, self.shared_memory)
        for path in paths:
            path.mkdir()
        try:
            yield folder
        finally:
            for path in paths:
                shutil.rmtree(path)
