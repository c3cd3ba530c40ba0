"""What this machine lets the chaos benchmark do: the undisturbed job, the places, and the kinds of faults left out."""

import contextlib
import functools
import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from chaos_kinds import KINDS, Kind
from chaos_places import Places, SmallDisk
from chaos_scene import MAX_RANKS, Workload, num_claims
from virtual_hosts import Cluster, environment, mpiexec

from hpcinfer.recovery.layout import JobPaths

_LIMIT_S = 300.0  # of the undisturbed job
_CHARACTERS = 60  # of a prompt
_SHARED_MEMORY = Path("/dev/shm")
_EVERY = 25  # this row asks for two choices, the next one cannot be served
T = TypeVar("T", Cluster, SmallDisk)


class Here(NamedTuple):
    """What all rounds share."""

    workload: Workload
    places: Places
    kinds: tuple[Kind, ...]
    skipped: dict[str, str]  # why, by kind of fault


@contextlib.contextmanager
def prepare(model: Path, num_rows: int, names: Sequence[str], folder: Path) -> Iterator[Here]:
    """Open the places that these kinds of faults need, and run the undisturbed job."""
    with contextlib.ExitStack() as stack:
        wanted, skipped = [KINDS[name] for name in names], {}

        def open_place(make: Callable[[], T], whose: list[Kind]) -> T | None:
            try:
                return stack.enter_context(contextlib.closing(make())) if whose else None
            except OSError as error:
                skipped.update(dict.fromkeys((kind.name for kind in whose), str(error)))
                return None

        cluster = open_place(lambda: Cluster(MAX_RANKS, folder / "cluster"), [k for k in wanted if k.launch.on_hosts])
        disk = open_place(lambda: SmallDisk(folder), [k for k in wanted if k.is_on_small_disk])
        memory = _SHARED_MEMORY / folder.name
        places = Places(folder, folder / "cache", folder / "leftovers", memory, cluster, disk)
        skipped.update({kind.name: reason for kind in wanted if (reason := _why_not(kind))})
        kinds = tuple(kind for kind in wanted if kind.name not in skipped)
        yield Here(_undisturbed(model, num_rows, places), places, kinds, skipped)


def _why_not(kind: Kind) -> str:
    """Why this kind of fault cannot be tried here; empty if it can."""
    if not mpiexec():
        return "no mpiexec"
    if kind.launch.is_tolerant and not _is_tolerant():
        return "this MPI ends all ranks when one dies: mpiexec knows no --with-ft ulfm"
    if kind.launch.is_supervised and "supervise" not in _help_of():
        return "hpcinfer has no supervise"
    missing = [option for option in kind.options if option.startswith("--") and option not in _help_of("run")]
    return f"hpcinfer run has no {missing[0]}" if missing else ""


@functools.cache
def _is_tolerant() -> bool:
    argv = [mpiexec(), "--with-ft", "ulfm", "-n", "1", "true"]
    return subprocess.run(argv, capture_output=True, env={**os.environ, **environment()}).returncode == 0


@functools.cache
def _help_of(*command: str) -> str:
    return subprocess.run([sys.executable, "-m", "hpcinfer", *command, "--help"], capture_output=True, text=True).stdout


def _undisturbed(model: Path, num_rows: int, places: Places) -> Workload:
    """Run the job in peace, without MPI."""
    prompts, output = places.folder / "prompts.jsonl", places.folder / "undisturbed.jsonl"
    prompts.write_text("".join(json.dumps(_row(number)) + "\n" for number in range(num_rows)))
    paths = ["--model", os.fspath(model), "--input", os.fspath(prompts), "--output", os.fspath(output)]
    argv = [sys.executable, "-m", "hpcinfer.run", *paths]
    variables = {**os.environ, "HPCINFER_CACHE": str(places.cache)}
    run = subprocess.run(argv, capture_output=True, text=True, env=variables, timeout=_LIMIT_S)
    if run.returncode != 0:
        raise SystemExit(f"the undisturbed job failed:\n{run.stderr}")
    data = output.read_bytes()
    tokens = tuple(json.loads(line).get("completion_tokens", 0) for line in data.splitlines())
    return Workload(model, prompts, data, tokens, num_claims(JobPaths(output)))


def _row(number: int) -> dict[str, object]:
    """A short prompt out of the documentation that comes with Python."""
    topics = pydoc_data.topics.topics
    text = topics[sorted(topics)[number % len(topics)]].strip()
    start = number * 97 % max(1, len(text) - _CHARACTERS)
    row = {"prompt": text[start : start + _CHARACTERS], "max_tokens": 8 + number * 7 % 40}
    kinds = {0: {"n": 2, "temperature": 0.7}, 1: {"top_p": 2.0}}
    return {**row, **kinds.get(number % _EVERY, {"temperature": number % 2 * 0.9})}
