import os
import subprocess
import sys

import pytest

from hpcinfer.comm.library import describe_library, is_fault_tolerant


def described(**environment):
    """What a fresh process says of its library, without starting MPI."""
    code = "from hpcinfer.comm.library import describe_library as d; print(repr(d(is_started=False)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, **environment}).stdout  # fmt: skip


def test_a_library_is_named_without_starting_it():
    pytest.importorskip("mpi4py")
    said = described(OMPI_MCA_ess_base_verbose="0")
    assert "name=''" in said or "transport=''" in said


def test_a_library_that_cannot_be_loaded_is_a_problem_in_one_line():
    pytest.importorskip("mpi4py")
    said = described(MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert "name=''" in said and "/nowhere/libmpi.so" in said and "\\n" not in said


@pytest.mark.mpi(min_size=2)
def test_open_mpi_says_how_its_messages_travel():
    from mpi4py import MPI

    library = describe_library(is_started=True)
    if not library.name.startswith("Open MPI"):
        pytest.skip("another library tells nothing")
    assert MPI.get_vendor()[0] in library.name and library.transport in ("ob1", "ucx", "cm")
    wanted = os.environ.get("OMPI_MCA_pml", "")  # noqa: SIM112  # so is its name
    assert not wanted or library.transport == wanted


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True), ("true", True)])
def test_fault_tolerance_is_what_the_launcher_asked_for(monkeypatch, value, expected):
    monkeypatch.delenv("OMPI_MCA_mpi_ft_enable", raising=False)
    if value is not None:
        monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", value)
    assert is_fault_tolerant() == expected
