"""Which MPI library is loaded here, how its messages travel, and whether it can outlive a dead rank."""

import ctypes
import os
import re
from pathlib import Path
from typing import NamedTuple

from hpcinfer.comm.launcher import read_launch

_FT_SWITCH = "OMPI_MCA_mpi_ft_enable"  # what `mpiexec --with-ft ulfm` sets for its ranks
_SELECTED = "mca_pml_base_selected_component"  # of libmpi: the component that moves all messages
_ANSWERS = ("MPIX_Query_cuda_support", "MPIX_Query_rocm_support")  # of Open MPI: whether it takes memory of GPUs
_QUESTION, _KINDS = "MPIX_GPU_query_support", (0, 2)  # of MPICH: of CUDA, of HIP
_PROJECT, _TYPE, _NAME = slice(12, 28), slice(40, 72), slice(84, 148)  # of that struct, as Open MPI 4 and 5 lay it out


class MpiLibrary(NamedTuple):
    """The MPI library of this process."""

    name: str  # as "Open MPI 5.0.11"; "" if none can be loaded
    problem: str = ""  # why none can be loaded
    transport: str = ""  # of Open MPI: ucx, cm or ob1; "" if unknown, or if MPI was not started
    has_fault_tolerance: bool = False  # ranks go on when one dies


def describe_library(*, is_started: bool) -> MpiLibrary:
    """Describe the MPI library that mpi4py loads.

    Not collective.

    Args:
        is_started: whether MPI runs in this process; if not, it is loaded, but not started.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = is_started
        mpi4py.rc.finalize = is_started
        from mpi4py import MPI

        vendor, numbers = MPI.get_vendor()
        text = MPI.Get_library_version()
    except (ImportError, RuntimeError) as error:
        return MpiLibrary("", " ".join(str(error).split()))
    name = f"{vendor} {'.'.join(map(str, numbers))}" if vendor != "unknown" else text.splitlines()[0].strip()
    return MpiLibrary(name, transport=_transport() if is_started else "", has_fault_tolerance=is_fault_tolerant())


def is_fault_tolerant() -> bool:
    """Whether the launcher has asked Open MPI to outlive dead ranks. Not collective."""
    return os.environ.get(_FT_SWITCH, "").lower() in ("1", "true", "t", "yes", "enabled")


def has_threads() -> bool:
    """Whether several threads may call the MPI library of this process, which has been started if there are ranks.

    Open MPI's own messaging over TCP says so, but stands still now and then when two do (in a fourth of the starts on
    two hosts, 5.0.11; never on one): between nodes it counts as one that they may not call.

    Not collective.
    """
    launch = read_launch()
    if launch.size == 1:
        return True  # there is no MPI
    from mpi4py import MPI

    is_sound = launch.local_size == launch.size or MPI.get_vendor()[0] != "Open MPI" or _transport() not in ("ob1", "")
    return is_sound and bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def _transport() -> str:
    """Name of Open MPI's messaging component: the library tells it nowhere but in its own memory."""
    try:
        paths = _libraries()
        component = bytes((ctypes.c_char * 148).in_dll(ctypes.CDLL(paths[0]), _SELECTED))
    except (OSError, ValueError, IndexError):
        return ""
    project, kind, name = (component[part].split(b"\0")[0] for part in (_PROJECT, _TYPE, _NAME))
    return name.decode() if (project, kind) == (b"ompi", b"pml") else ""


def claims_device_memory() -> bool:
    """Whether the MPI library of this process, which has been started, says that it takes memory of GPUs.

    Cray MPICH says so by a variable that its users set; Open MPI and MPICH by functions. Not collective.
    """
    if os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1":
        return True
    try:
        library = ctypes.CDLL(_libraries()[0])
    except (OSError, IndexError):
        return False
    if any(getattr(library, name)() == 1 for name in _ANSWERS if hasattr(library, name)):
        return True
    ask, answer = getattr(library, _QUESTION, None), ctypes.c_int(0)
    return ask is not None and any(ask(kind, ctypes.byref(answer)) == 0 and answer.value == 1 for kind in _KINDS)


def _libraries() -> list[str]:
    """Paths of the MPI libraries that are loaded; vendors add to the name."""
    return re.findall(r"(/\S*/libmpi(?:_\w+)?\.so\S*)", Path("/proc/self/maps").read_text())
