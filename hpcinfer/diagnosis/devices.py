"""Which GPUs and fast networks a rank sees, without any vendor's library."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_QUERY = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
_QUERY_LIMIT_S = 5.0


class Devices(NamedTuple):
    """Hardware of the node beside its CPUs."""

    node_gpus: int = 0  # that the driver has, whoever they were given to
    open_gpus: int = 0  # whose device files this rank may open
    tool_gpus: int = -1  # that nvidia-smi names; -1 where there is no such tool, or it does not answer
    fabrics: tuple[str, ...] = ()  # InfiniBand, RoCE, Omni-Path and Slingshot adapters


def read_devices(root: Path = Path("/")) -> Devices:
    """Look into /proc, /sys and /dev.

    Args:
        root: where these are.
    """
    driver = _names(root / "proc/driver/nvidia/gpus")
    files = [root / "dev" / name for name in _names(root / "dev") if _is_gpu(name)]
    renderers = [path for path in _amd_nodes(root) if _can_open(path)]
    open_gpus = sum(map(_can_open, files)) or len(renderers)
    node_gpus = max(len(driver), len(files)) or len(_amd_nodes(root))
    fabrics = [*_names(root / "sys/class/infiniband"), *_names(root / "sys/class/cxi")]
    return Devices(node_gpus, open_gpus, _ask_tool() if files else -1, tuple(sorted(fabrics)))


def _is_gpu(name: str) -> bool:
    return name.startswith("nvidia") and name[6:].isdigit()


def _amd_nodes(root: Path) -> list[Path]:
    """Device files of AMD's GPUs; /dev/kfd is there where its compute driver is."""
    if not (root / "dev/kfd").exists():
        return []
    return [root / "dev/dri" / name for name in _names(root / "dev/dri") if name.startswith("renderD")]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _can_open(path: Path) -> bool:
    """Whether the allocation lets us: cgroups refuse the GPUs of others when their file is opened."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _ask_tool() -> int:
    if not shutil.which(_QUERY[0]):
        return -1
    try:
        run = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return -1
    return len(run.stdout.split()) if run.returncode == 0 else -1
