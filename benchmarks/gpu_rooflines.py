"""What the device can do at most: reading its memory, products in four types, copies from the host."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_bench import Bench, Row, UnavailableError

Work = Callable[[], object]


def run(bench: Bench) -> Iterator[Row]:
    """Give a row for each candidate: its kind, and bytes or operations per second."""
    size = bench.sizes.memory_bytes
    for name, moved, work in _reads(bench.device, size):
        yield bench.attempt({"kind": "memory", "what": name}, _moved, bench, moved, work)
    for shape in bench.sizes.products:
        for kind, make in _PRODUCTS.items():
            row = {"kind": kind, "what": "x".join(map(str, shape))}
            yield bench.attempt(row, _rate, bench, make, shape)
    yield bench.attempt({"kind": "pcie", "what": "pinned memory to device"}, _copies, bench, size // 16)


def _reads(device: torch.device, size: int) -> Iterator[tuple[str, int, Work]]:
    """Ways to read memory much larger than a cache, and the bytes that each moves."""
    values = torch.randn(size // 4, device=device)
    target = torch.empty_like(values)
    matrix, vector = values.view(-1, 1024), torch.randn(1024, device=device)
    yield "sum", size, values.sum
    yield "largest value", size, values.amax
    yield "matrix times vector", size, lambda: torch.mv(matrix, vector)
    yield "copy, read and written", 2 * size, lambda: target.copy_(values)


def _moved(bench: Bench, size: int, work: Work) -> Row:
    return {"rate": size / bench.seconds(work)}


def _rate(bench: Bench, make: Callable[..., Work], shape: tuple[int, int, int]) -> Row:
    rows, columns, inputs = shape
    try:
        seconds = bench.seconds(make(bench.device, rows, columns, inputs))
    except (RuntimeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnavailableError(f"torch cannot: {str(error).splitlines()[0]}") from None
    return {"rate": 2 * rows * columns * inputs / seconds}


def _floats(dtype: torch.dtype) -> Callable[..., Work]:
    def make(device: torch.device, rows: int, columns: int, inputs: int) -> Work:
        a, b = _random(device, rows, inputs).to(dtype), _random(device, columns, inputs).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        return lambda: torch.mm(a, b.t(), out=out)

    return make


def _int8(device: torch.device, rows: int, columns: int, inputs: int) -> Work:
    a, b = (torch.randint(-127, 128, (size, inputs), dtype=torch.int8, device=device) for size in (rows, columns))
    return lambda: torch._int_mm(a, b.t())


def _fp8(device: torch.device, rows: int, columns: int, inputs: int) -> Work:
    a, b = (_random(device, size, inputs).to(torch.float8_e4m3fn) for size in (rows, columns))
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device)


_PRODUCTS: dict[str, Any] = {
    "bf16": _floats(torch.bfloat16), "fp16": _floats(torch.float16), "int8": _int8, "fp8": _fp8,
}  # fmt: skip


def _copies(bench: Bench, size: int) -> Row:
    is_gpu = bench.device.type == "cuda"
    source = torch.empty(size, dtype=torch.uint8, pin_memory=is_gpu).random_()
    target = torch.empty(size, dtype=torch.uint8, device=bench.device)
    return {"rate": size / bench.seconds(lambda: target.copy_(source, non_blocking=True))}
