"""The cores that ranks really have: several hosts may be one machine, and ranks may share its cores.

`python -m hpcinfer.scaling.cores` is started as the ranks of a run would be, without MPI, and says what each one has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Cores(NamedTuple):
    """What all ranks of a shape have together."""

    num_cores: int  # physical cores, each once
    machines: int  # kernels that run, whatever the hosts are called
    threads: int  # of a rank


def say() -> str:
    """Describe the cores of this process in one line of JSON."""
    import os

    from hpcinfer.comm.topology import machine_id
    from hpcinfer.engine.placement import resolve_threads
    from hpcinfer.kernels.native.library import available_cpus, cores_of

    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else None
    cores = [min(core) for core in cores_of(available_cpus())]
    return json.dumps({"machine": machine_id(), "cores": cores, "threads": resolve_threads(wanted, os.environ)})


def threads_of(flags: Sequence[str]) -> int | None:
    """The value of --threads among the options of a run; None if it is not there, or no number."""
    values = [flag.partition("=")[2] for flag in flags if flag.startswith("--threads=")]
    return int(values[-1]) if values and values[-1].isdigit() else None


def count_cores(text: str) -> Cores | None:
    """Add up what the ranks said; None if none of them did."""
    said = list(_lines(text))
    if not said:
        return None
    cores = {(each["machine"], core) for each in said for core in each["cores"]}
    return Cores(len(cores), len({each["machine"] for each in said}), max(each["threads"] for each in said))


def _lines(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        start = line.find('{"machine": ')  # launchers may put a rank before it
        if start >= 0:
            try:
                yield json.loads(line[start:])
            except ValueError:
                continue


if __name__ == "__main__":
    sys.stdout.write(say() + "\n")
