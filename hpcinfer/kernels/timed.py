"""Kernels that measure themselves, for benchmarks: the seconds of their array functions go to phases of `Metrics`."""

from typing import Any

from hpcinfer.kernels.protocol import Kernels
from hpcinfer.report.metrics import Metrics

# Preparation (linear, vector, kv_cache, rope_table, profile) and what sampling calls (grain_stats, log, exp) are left
# to the phases around them.
PHASES = {
    **dict.fromkeys(("grain_linear", "partial_linear"), "products"),
    "attention": "attention",
    **dict.fromkeys(("empty", "host", "device", "embed", "take_rows", "split_heads"), "other kernels"),
    **dict.fromkeys(("rms_norm", "add", "add_bias", "silu_mul", "rotate_and_store"), "other kernels"),
}


class TimedKernels:
    """A kernel set with a stopwatch around each array function; everything else is passed on."""

    def __init__(self, kernels: Kernels, metrics: Metrics) -> None:
        self._kernels = kernels
        for name, phase in PHASES.items():
            setattr(self, name, metrics.phase(phase)(getattr(kernels, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)
