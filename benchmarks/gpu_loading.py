"""Loading weights from a store that is in the page cache, beside what file and bus can do."""

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_peer
import numpy as np
from gpu_bench import Bench, Row
from gpu_engine import Model, Way
from random_model import numbered_tokenizer

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.weights.conversion import convert
from hpcinfer.weights.reader import Store

_PIECE = 16 << 20  # bytes of a request
_THREADS = 8


def run(bench: Bench) -> Iterator[Row]:
    """Give one row: bytes per second of loading, and of reading the same files without loading them."""
    about = {"store": str(bench.store) if bench.store else bench.sizes.loading_shape}
    yield bench.attempt(about, _measure, bench)


def make_store(bench: Bench) -> Path:
    """Write a store of random bfloat16 weights."""
    shape, folder = bench.sizes.shapes[bench.sizes.loading_shape], bench.folder / "model"
    gpu_peer.make_random(shape, 2048, bench.device).save_pretrained(folder)
    bench.free_memory()
    numbered_tokenizer(shape.vocab_size).save(str(folder / "tokenizer.json"))
    convert(folder, bench.folder / "loaded.store", SerialGroup())
    shutil.rmtree(folder)
    return bench.folder / "loaded.store"


def _measure(bench: Bench) -> Row:
    path = bench.store or make_store(bench)
    rates, read = list[float](), list[float]()
    with Store.open(path) as store:
        size, files = store.num_bytes, [path / name for name in store.file_names]
        model = Model(store, Way(), 1)  # fills the page cache, compiles what is compiled at the first use
        for _ in range(bench.rounds):
            read.append(read_files(files))
            bench.wait()
            start = time.perf_counter()
            model.load()
            bench.wait()
            rates.append(size / (time.perf_counter() - start))
    return {"bytes": size, "by_round": rates, "rate": float(np.median(rates)), "file_rate": max(read)}


def read_files(files: list[Path]) -> float:
    """Read files with several threads into memory that is there; bytes per second."""
    buffers = [bytearray(_PIECE) for _ in range(_THREADS)]
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, _PIECE)]

    def read(mine: int) -> int:
        return sum(_read_piece(*piece, buffers[mine]) for piece in pieces[mine::_THREADS])

    with ThreadPoolExecutor(_THREADS) as pool:
        start = time.perf_counter()
        size = sum(pool.map(read, range(_THREADS)))
        return size / (time.perf_counter() - start)


def _read_piece(file: Path, start: int, buffer: bytearray) -> int:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [buffer], start)
    finally:
        os.close(descriptor)
