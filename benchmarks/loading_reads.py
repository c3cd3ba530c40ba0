"""How fast a store is read from a cold file system: hpcinfer's reader, fio, and plain h5py, in turns.

    python benchmarks/loading_reads.py                          # makes a random store of 1.3 GiB in --dir
    python benchmarks/loading_reads.py --store llama.store --rounds 5

Before each turn the store's files are put out of this machine's page cache (by posix_fadvise; the host of a virtual
machine may keep them). fio reads the same files with requests of the same size, as many at a time; without fio its
lines are left out. What hpcinfer reads is compared with its checksums, except where the line says otherwise.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest import mock

import h5py
from random_model import SHAPES, write_random_model

from hpcinfer.units import format_bytes
from hpcinfer.weights import parallel_reads
from hpcinfer.weights.parallel_reads import IN_FLIGHT
from hpcinfer.weights.reader import Store, UnitRead
from hpcinfer.weights.requests import REQUEST_BYTES

FIO = "fio"  # the program; ratios are to the best line that begins so
Turn = Callable[[], float]  # reads everything, and says how many bytes per second


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="an existing store")
    parser.add_argument("--dir", type=Path, help="where a random store is made (in a new temporary directory)")
    parser.add_argument("--shape", choices=SHAPES, default="M2", help="of the random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--portion", type=int, default=256, help="MiB of units that are asked for at once")
    args = parser.parse_args()
    with _store(args) as path:
        rates = _measure(weight_files(path), _turns(path, args.portion << 20), args.rounds)
        print("\n".join(table(path, rates)))


@contextmanager
def _store(args: argparse.Namespace) -> Iterator[Path]:
    if args.store:
        yield args.store
        return
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=args.dir))
    try:
        model = write_random_model(folder / "model", SHAPES[args.shape])
        convert = [sys.executable, "-m", "hpcinfer", "convert", model, folder / "store"]
        subprocess.run(convert, check=True, capture_output=True)
        shutil.rmtree(model)
        yield folder / "store"
    finally:
        shutil.rmtree(folder)


def _turns(path: Path, portion_bytes: int) -> dict[str, Turn]:
    """What is measured, by the name of its line."""
    turns: dict[str, Turn] = {
        "hpcinfer": lambda: read_store(path, portion_bytes, direct=False),
        "hpcinfer, O_DIRECT": lambda: read_store(path, portion_bytes, direct=True),
        "hpcinfer, unchecked": lambda: read_unchecked(path, portion_bytes, direct=False),
        "hpcinfer, O_DIRECT, unchecked": lambda: read_unchecked(path, portion_bytes, direct=True),
    }
    if not shutil.which(FIO):
        print("fio is not installed: its lines are left out")
    elif not _files_for_fio(path):
        print("no file is as large as a request: the lines of fio are left out")
    else:
        turns[f"{FIO}, O_DIRECT"] = lambda: run_fio(path, "--direct=1", "--ioengine=libaio")
        turns[f"{FIO}, page cache"] = lambda: run_fio(path, "--direct=0", "--ioengine=io_uring")
    turns["h5py, dataset[...]"] = lambda: read_with_h5py(path)
    return turns


def _measure(files: list[Path], turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Bytes per second of each, by round."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            for file in files:
                evict(file)
            rates[name].append(turn())
    return rates


def weight_files(path: Path) -> list[Path]:
    """Files of a store that hold weights."""
    return sorted({path / param.file for param in Store.open(path).parameters.values()})


def evict(path: Path) -> None:
    """Put a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_store(path: Path, portion_bytes: int, *, direct: bool) -> float:
    """Read all units of a store, in portions; opening it and asking HDF5 for places is part of the time."""
    start = time.perf_counter()
    with Store.open(path) as store:
        store.direct = direct
        portion, size = list[UnitRead](), 0
        for name, param in store.parameters.items():
            values = store.empty(name, len(param.checksums))
            portion += [UnitRead(name, unit, values[unit]) for unit in range(len(values))]
            size += values.nbytes
            if size >= portion_bytes:
                store.read_into(portion)
                portion, size = [], 0
        store.read_into(portion)
        return store.bytes_read / (time.perf_counter() - start)


def read_unchecked(path: Path, portion_bytes: int, *, direct: bool) -> float:
    """As `read_store`; what comes is compared with nothing."""
    with mock.patch.object(parallel_reads._Work, "_compare", lambda *_: None):
        return read_store(path, portion_bytes, direct=direct)


def _files_for_fio(path: Path) -> list[Path]:
    """It refuses files that hold no whole request."""
    return [file for file in weight_files(path) if file.stat().st_size >= REQUEST_BYTES]


def run_fio(path: Path, *options: str) -> float:
    """Read the files of a store with as many requests of the same size; by fio's own clock."""
    names = ":".join(str(file).replace(":", "\\:") for file in _files_for_fio(path))
    shape = [f"--bs={REQUEST_BYTES}", f"--iodepth={IN_FLIGHT}", "--rw=read", "--readonly", "--invalidate=0"]
    order = ["--file_service_type=sequential", "--output-format=json", "--name=store", f"--filename={names}"]
    done = subprocess.run([FIO, *shape, *order, *options], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def read_with_h5py(path: Path) -> float:
    """Read all datasets of a store, one after the other."""
    start, num_bytes = time.perf_counter(), 0
    for name in weight_files(path):
        with h5py.File(name, "r") as file:
            num_bytes += sum(dataset[...].nbytes for dataset in file.values())
    return num_bytes / (time.perf_counter() - start)


def table(path: Path, rates: dict[str, list[float]]) -> list[str]:
    """Medians over the rounds, and the median of each round's ratio to the best fio of that round."""
    num_bytes = sum(file.stat().st_size for file in weight_files(path))
    best = [max(each) for each in zip(*(rates[name] for name in rates if name.startswith(FIO)), strict=True)]
    rows = [
        f"{format_bytes(num_bytes)}; requests of {format_bytes(REQUEST_BYTES)}, {IN_FLIGHT} in flight; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        f"{'':<32} {'GB/s':>6} {'to fio':>8}  GB/s by round",
    ]
    for name, each in rates.items():
        ratio = f"{100 * median(a / b for a, b in zip(each, best, strict=True)):.0f} %" if best else ""
        by_round = " ".join(f"{rate / 1e9:.2f}" for rate in each)
        rows.append(f"{name:<32} {median(each) / 1e9:>6.2f} {ratio:>8}  {by_round}")
    return rows


if __name__ == "__main__":
    main()
