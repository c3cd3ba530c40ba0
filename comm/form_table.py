"""The table of what was measured: one small file for each kind of machine and MPI, in a cache folder of the user.

A job's root reads it and tells all ranks. A file that is missing, unreadable or of something else is no table.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcinfer import __version__
from hpcinfer.comm.library import describe_library
from hpcinfer.comm.node.library import LAYOUT, load
from hpcinfer.comm.protocol import Collectives
from hpcinfer.comm.selector import AUTO, Measured, Point, Selector

_FORMAT = 2
_MOST_BYTES, _MOST_POINTS = 1 << 20, 256  # of a table, of a curve: what is larger is none
_LARGEST = 1 << 40  # bytes of a sum
_TRANSPORT = ("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_mtl", "UCX_TLS", "UCX_NET_DEVICES", "FI_PROVIDER",
              "MPIR_CVAR_CH4_NETMOD", "OMPI_MCA_mpi_ft_enable")  # fmt: skip

Table = dict[str, dict[str, dict[str, list[Point]]]]  # by shape of the group, by operation, by form or way


def machine_signature(world: Collectives) -> str:
    """Describe what a measurement depends on: processor, cores, network, MPI, how messages travel, what moves them.

    Not collective.
    """
    mpi = describe_library(is_started=world.size > 1)
    settings = [f"{name}={os.environ[name]}" for name in _TRANSPORT if os.environ.get(name)]
    code = f"hpcinfer {__version__}", "no node library" if load() is None else f"node library {LAYOUT}"
    machine = _processor(), f"{os.cpu_count()} CPUs", *describe_network()
    return ", ".join([*machine, mpi.name, mpi.transport, *settings, *code])


def describe_network(devices: Path = Path("/sys/class")) -> list[str]:
    """Name the network interfaces and fabric ports of this node that are up, with their speeds; "no network" if none.

    Not collective. Interfaces without hardware count only where none has any, as in a container: they come and go.
    """
    up = [each for each in sorted(devices.glob("net/*")) if each.name != "lo"
          and _read(each / "operstate") in ("up", "unknown")]  # fmt: skip
    nets = [each for each in up if (each / "device").exists()] or up
    found = [f"{each.name} {_read(each / 'speed')}".removesuffix("-1").strip() for each in nets]
    found += [f"{rate.parents[2].name} {_read(rate)}" for rate in sorted(devices.glob("infiniband/*/ports/*/rate"))]
    return found or ["no network"]


def table_path(signature: str) -> Path:
    """Name the file of a machine: in $HPCINFER_CACHE, else in the user's cache folder. Not collective."""
    key = hashlib.sha256(signature.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("HPCINFER_CACHE") or f"{cache}/hpcinfer")
    return folder.expanduser() / f"collectives-{key}.json"


def read_table(signature: str) -> Table:
    """Read the table of a machine; empty if there is none that can be read. Not collective."""
    try:
        with table_path(signature).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        return parse_table(json.loads(data), signature) if len(data) <= _MOST_BYTES else {}
    except (OSError, ValueError, RuntimeError):
        return {}


def write_table(signature: str, table: Mapping[str, Measured]) -> Path:
    """Write a table; shapes that it does not have stay as they were. Not collective.

    Raises:
        OSError: there is no place for it.
    """
    path = table_path(signature)
    shapes = {**read_table(signature), **table}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        whole.write_text(json.dumps({"format": _FORMAT, "signature": signature, "shapes": shapes}, indent=1) + "\n")
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    return path


def parse_table(content: Any, signature: str) -> Table:
    """Check what a file or another rank says; empty if it is of another machine.

    Raises:
        ValueError: it is no table.
    """
    try:
        if content["format"] != _FORMAT or content["signature"] != signature:
            return {}
        return {str(shape): {str(operation): {str(form): _points(points) for form, points in curves.items()}
                             for operation, curves in operations.items()}
                for shape, operations in content["shapes"].items()}  # fmt: skip
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a table of collectives: {error!r}") from None


def load_selector(world: Collectives, wanted: str = AUTO, overlap: str = AUTO) -> Selector:
    """Make what chooses forms in a job: by the table that the root finds.

    Collective over the world; the same on all ranks.

    Args:
        world: all ranks.
        wanted: a form for all sizes, or AUTO.
        overlap: whether sums travel in halves, or AUTO.
    """
    if world.size == 1:
        return Selector(wanted, overlap=overlap)
    data = None
    if world.rank == 0:
        signature = machine_signature(world)
        content = {"format": _FORMAT, "signature": signature, "shapes": read_table(signature)}
        data = json.dumps(content).encode()
    content = json.loads(world.broadcast_bytes(data))
    return Selector(wanted, parse_table(content, content["signature"]), overlap)


def _points(points: Any) -> list[Point]:
    found = [Point(int(size), float(seconds)) for size, seconds in points]
    sizes = [point.num_bytes for point in found]
    if len(found) > _MOST_POINTS or sizes != sorted(set(sizes)) or not all(0 < size <= _LARGEST for size in sizes):
        raise ValueError(f"sizes {sizes[:8]} are too many, too large, or do not ascend")
    if not all(0 < point.seconds < math.inf for point in found):
        raise ValueError("a time is none")
    return found


def _read(path: Path) -> str:
    """A line of the kernel's; empty where it says none, as of the speed of an interface that has none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _processor() -> str:
    """Name of the processor, as the kernel says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)
