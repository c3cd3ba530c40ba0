"""Timed kernels give the same arrays, and the time of every array function goes somewhere."""

import inspect

import numpy as np

from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.kernels.timed import PHASES, TimedKernels
from hpcinfer.report.metrics import Metrics

UNTIMED = {"profile", "kv_cache", "linear", "vector", "rope_table", "grain_stats", "log", "exp"}


def test_every_function_of_the_protocol_has_a_phase_or_is_known_to_have_none() -> None:
    functions = {name for name, _ in inspect.getmembers(Kernels, inspect.isfunction) if not name.startswith("_")}
    assert functions == UNTIMED | set(PHASES)
    assert not UNTIMED & set(PHASES)


def test_results_pass_through_and_seconds_are_counted() -> None:
    kernels, metrics = create_kernels(), Metrics()
    timed = TimedKernels(kernels, metrics)
    x = kernels.device(np.arange(64, dtype=np.float32).reshape(4, 16))
    weight = timed.linear(np.ones((2, 16, 16), np.float32), "float32")
    assert not metrics.seconds
    expected = kernels.host(kernels.grain_linear(x, weight))
    assert (timed.host(timed.grain_linear(x, weight)) == expected).all()
    assert set(metrics.seconds) == {"products", "other kernels"}
    assert min(metrics.seconds.values()) > 0
    assert timed.name == kernels.name
