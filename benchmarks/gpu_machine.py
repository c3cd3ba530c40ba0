"""Which GPU it is, and which versions run on it."""

import importlib.metadata
import platform
from collections.abc import Iterator

import torch
from gpu_bench import Bench, Row

_PACKAGES = ("hpcinfer", "torch", "triton", "transformers", "numpy")


def run(bench: Bench) -> Iterator[Row]:
    """Give one row."""
    about: Row = {"device": "Triton's interpreter"}
    if bench.device.type == "cuda":
        found = torch.cuda.get_device_properties(bench.device)
        about = {"device": found.name, "memory GiB": round(found.total_memory / 2**30, 1),
                 "multiprocessors": found.multi_processor_count}  # fmt: skip
    installed = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    versions = {"Python": platform.python_version(), "CUDA": torch.version.cuda or torch.version.hip or "none",
                **{name: installed[name] for name in _PACKAGES if name in installed}}  # fmt: skip
    yield {**about, "versions": versions}
