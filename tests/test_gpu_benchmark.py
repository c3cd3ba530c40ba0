"""The GPU benchmark runs as toys in Triton's interpreter, loses nothing when a part breaks, and counts right."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from sources import CHECKOUT

from hpcinfer.data.completion import Choice, TokenLogprob
from hpcinfer.dtypes import dequantise
from hpcinfer.errors import ConfigError
from hpcinfer.weights.schema import param_specs

MODULES = ("gpu", "gpu_bench", "gpu_correctness", "gpu_engine", "gpu_gaps", "gpu_results", "gpu_sizes", "gpu_tables",
           "gpu_weights")  # fmt: skip
PROGRAM = CHECKOUT / "benchmarks" / "gpu.py"
# the interpreter's own products depend on the batch; see tests/interpreter.py
DRIVER = """
import runpy, sys
import pytest
sys.path.insert(0, sys.argv[1])
from interpreter import play_gpu
play_gpu(pytest.MonkeyPatch())
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Benchmarks(NamedTuple):
    """Modules of the benchmark, which is a program and not a package."""

    gpu: Any
    bench: Any
    correctness: Any
    engine: Any
    gaps: Any
    results: Any
    sizes: Any
    tables: Any
    weights: Any


@pytest.fixture(scope="module")
def benchmarks(benchmark_module: Callable[[str], ModuleType]) -> Benchmarks:
    return Benchmarks(*map(benchmark_module, MODULES))


@pytest.mark.time_limit(240)
def test_all_parts_run_as_toys(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    options = ["--tiny", "--rounds", "1", "--precisions", "bf16,int8", "--json", tmp_path / "r.json", "--dir", tmp_path]
    argv = [sys.executable, "-c", DRIVER, CHECKOUT / "tests", PROGRAM, *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(argv, capture_output=True, text=True, timeout=230, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {name: [row for row in part["rows"] if "skipped" not in row] for name, part in result["parts"].items()}
    has_transformers = importlib.util.find_spec("transformers") is not None
    assert [name for name, found in rows.items() if not found] == ["gaps", *([] if has_transformers else ["loading"])]
    assert len({row["sha256"] for row in rows["correctness"] if row["check"] == "bytes"}) == 1
    assert all(row["is_right"] for row in rows["correctness"])
    assert len(rows["decode"]) == 6 and all(row["output_tokens_per_s"] > 0 for row in rows["decode"])
    assert {row["kind"] for row in rows["rooflines"]} >= {"memory", "bf16", "pcie"}
    assert {row["engine"] for row in rows["bulk"]} >= {"hpcinfer", "hpcinfer, reproducible"}
    wanted = {each["what"] for each in result["targets"]}
    assert {"decode, batch 1, reproducible", "cost of reproducible kernels, batch 1"} <= wanted
    assert "MISSED" in run.stdout and [path.name for path in tmp_path.iterdir()] == ["r.json"]
    argv = [sys.executable, CHECKOUT / "benchmarks" / "gpu_tables.py", tmp_path / "r.json"]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout in run.stdout


@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    argv = [sys.executable, "-X", "importtime", PROGRAM]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 2 and "no GPU here" in run.stderr
    assert "| torch" not in run.stderr and "numpy" not in run.stderr


def run_fake_part(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, part: Any) -> dict[str, Any]:
    """Run a part that does what the generator does."""
    monkeypatch.setattr(gpu, "_part", part)
    monkeypatch.setattr(gpu, "_GRACE_S", 0.5)
    result: dict[str, Any] = gpu._run_part("fake", Namespace(dir=None), 0.5)
    return result


def test_a_broken_part_loses_no_row(benchmarks: Benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(task: Any) -> Iterator[dict[str, Any]]:
        yield {"rate": 1}
        raise ValueError("broken")

    def dies(task: Any) -> Iterator[dict[str, Any]]:
        yield {"rate": 2}
        os._exit(7)

    def hangs(task: Any) -> Iterator[dict[str, Any]]:
        yield {"rate": 3}
        time.sleep(60)

    found = [run_fake_part(benchmarks.gpu, monkeypatch, part) for part in (breaks, dies, hangs)]
    assert [part["rows"][0]["rate"] for part in found] == [1, 2, 3]
    assert found[0]["rows"][1] == {"failed": "ValueError: broken"}
    assert [part["ended"] for part in found] == ["", "ended with 7", "stopped after 1 s"]
    assert not any(benchmarks.results.is_right({"fake": part}) for part in found)


def test_what_cannot_be_measured_says_why(benchmarks: Benchmarks, tmp_path: Path) -> None:
    import torch

    def refuses() -> dict[str, Any]:
        raise ConfigError("no room", expected="more")

    def make(end: float) -> Any:
        return benchmarks.bench.Bench(torch.device("cpu"), benchmarks.sizes.TOY, ("bf16",), 1, tmp_path, end)

    bench = make(time.monotonic() + 60)
    assert bench.attempt({"batch": 1}, refuses) == {"batch": 1, "skipped": "ConfigError: no room"}
    assert bench.attempt({"batch": 1}, lambda rate: {"rate": rate}, 5) == {"batch": 1, "rate": 5}
    assert bench.obtain({}, int, "7") == (7, []) and bench.obtain({"a": 1}, refuses).rows[0]["a"] == 1
    assert "time" in make(time.monotonic() - 1).attempt({}, dict)["skipped"]
    assert bench.attempt({}, lambda: 1 / 0) == {"failed": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize("precision, dtype, error", [("bf16", "bfloat16", 0.02), ("int8", "int8", 0.1),
                                                     ("int4", "int4", 0.1)])  # fmt: skip
def test_random_weights_have_the_sizes_of_a_store(
    benchmarks: Benchmarks, precision: str, dtype: str, error: float
) -> None:
    shape = benchmarks.sizes.Shape(256, 1, 8, 2, 512, 512)
    source = benchmarks.weights.RandomSource(shape, precision, 16)
    for spec in param_specs(source.config, source.grains):
        if spec.name.endswith("proj.weight"):
            values, found, scales = source.read_weight(spec.name)
            weights = dequantise(values, found, scales)
            assert found == dtype and weights.shape == spec.shape
            assert abs(weights.std() / 0.02 - 1) < error and abs(weights.mean()) < 0.005
            part, _, _ = source.read_weight(spec.name, range(1, 2))
            assert part.shape == (1, *values.shape[1:])
    assert (source.read("norm.weight")[0] == 0x3F80).all()


def test_a_step_reads_everything_but_the_embedding(benchmarks: Benchmarks) -> None:
    shape = benchmarks.sizes.Shape(64, 2, 4, 2, 512, 512)
    source = benchmarks.weights.RandomSource(shape, "bf16", 16)
    layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 512 + 2 * 64
    assert source.step_bytes == 2 * (2 * layer + 512 * 64 + 64)
    assert source.operations(3, 2) == 2 * (3 * 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 512) + 2 * 512 * 64)
    assert source.attention_operations(3) == 2 * 2 * 2 * 64 * (1 + 2 + 3)


def made_up_parts() -> dict[str, Any]:
    """Rows of all parts, with round numbers."""
    way = {"shape": "big", "precision": "bf16", "dtype": "bfloat16", "graphs": True, "in_flight": 2}
    decode = {"step_bytes": 80.0, "step_operations": 10.0, "joules_per_token": None, "context": 3.0}
    return {name: {"rows": rows, "ended": ""} for name, rows in {
        "rooflines": [{"kind": "memory", "rate": 90.0}, {"kind": "memory", "rate": 100.0},
                      {"kind": "pcie", "rate": 5.0}, {"kind": "bf16", "rate": 20.0},
                      {"kind": "fp8", "skipped": "torch cannot"}],
        "decode": [{**way, **decode, "reproducible": True, "batch": 1, "step_s": 1.0, "output_tokens_per_s": 90.0},
                   {**way, **decode, "reproducible": False, "batch": 1, "step_s": 1.6, "output_tokens_per_s": 100.0},
                   {**way, **decode, "reproducible": True, "batch": 1, "step_s": 0.8, "output_tokens_per_s": 9.0,
                    "in_flight": 1},
                   {**way, "reproducible": False, "batch": 64, "skipped": "no room"}],
        "prefill": [{**way, "reproducible": True, "length": 8, "prompts": 2, "tokens_per_s": 1.0,
                     "operations_per_s": 14.0}],
        "bulk": [{**way, "engine": "hpcinfer", "prompts": 9, "output_tokens_per_s": 60.0, "total_tokens_per_s": 70.0,
                  "joules_per_token": 2.0, "seconds": [1.0]},
                 {**way, "engine": "transformers", "batch": 8, "prompts": 9, "output_tokens_per_s": 10.0,
                  "total_tokens_per_s": 20.0, "joules_per_token": None, "seconds": [1.0]}],
        "loading": [{"store": "big", "bytes": 9, "rate": 3.0, "file_rate": 4.0}],
    }.items()}  # fmt: skip


def test_targets_are_fractions_of_what_was_measured(benchmarks: Benchmarks) -> None:
    parts = made_up_parts()
    found = {each.what: (round(each.found, 6), each.is_hit) for each in benchmarks.results.targets(parts, "big")}
    assert found == {
        "decode, batch 1, reproducible": (0.8, True), "decode, batch 1": (0.5, False),
        "decode, batch 1, reproducible, one in flight": (1.0, True),
        "prefill of 8 tokens, reproducible": (0.7, True), "bulk to transformers, hpcinfer": (6.0, True),
        "loading": (0.75, False), "cost of reproducible kernels, batch 1": (0.1, True),
    }  # fmt: skip
    assert benchmarks.results.is_right(parts)
    without = benchmarks.results.targets({**parts, "rooflines": {"rows": []}}, "big")
    assert [each.what.partition(",")[0] for each in without] == ["bulk to transformers", "cost of reproducible kernels"]
    row = {**parts["decode"]["rows"][0], "step_operations": 30.0, "step_s": 2.0}
    assert benchmarks.results.decode_bound(row, {"memory": 100.0, "bf16": 20.0}) == 0.75


def test_tables_say_everything(benchmarks: Benchmarks) -> None:
    parts = made_up_parts()
    targets = [each._asdict() for each in benchmarks.results.targets(parts, "big")]
    machine = {"device": "a GPU", "versions": {}}
    lines = benchmarks.tables.lines({"machine": machine, "parts": parts, "targets": targets})
    text = "\n".join(lines)
    assert "  decode, big, bf16, 64, graphs: no room" in lines and "MISSED" in text
    assert "transformers, batch 8" in text and "80.0 %" in text and "6.00" in text


def test_a_plot_is_drawn(benchmark_module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw = benchmark_module("gpu_plot").draw
    draw({"machine": {"device": "a GPU"}, "parts": made_up_parts()}, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    draw({"machine": {"device": "a GPU"}, "parts": {}}, tmp_path / "plot.svg")
    assert len(drawn) > len((tmp_path / "plot.svg").read_text())


def test_a_part_is_right_only_if_all_its_checks_are(benchmarks: Benchmarks) -> None:
    is_right = benchmarks.results.is_right
    assert is_right({"correctness": {"rows": [{"is_right": True}, {"skipped": "why"}], "ended": ""}})
    assert not is_right({"correctness": {"rows": [{"is_right": True}, {"is_right": False}], "ended": ""}})


def test_gaps_are_what_no_kernel_covers(benchmarks: Benchmarks) -> None:
    seen = ((10, 20, "b"), (0, 4, "a"), (2, 5, "b"), (15, 18, "a"), (20, 25, "a"))
    spans = [benchmarks.gaps.Span(*each) for each in seen]
    assert benchmarks.gaps.busy(spans) == (20, 25, 1)
    assert benchmarks.gaps.top(spans) == [("b", 13.0, 2), ("a", 12.0, 3)]
    assert benchmarks.gaps.between(spans)["between"] == pytest.approx(0.2)


def test_tokens_count_up_to_the_first_that_leads_too_little(benchmarks: Benchmarks) -> None:
    outputs = benchmarks.correctness._Outputs
    mine, theirs = outputs([[1, 2, 3], [4, 5, 6]], []), outputs([[1, 9, 9], [4, 7, 6]], [])
    assert benchmarks.correctness._agreement(mine, theirs, [[0.5, 0.001, 0.5], [0.5, 0.5, 0.5]], 0.01) == (4, 3)


def test_errors_are_largest_in_float32_and_mean_elsewhere(benchmarks: Benchmarks) -> None:
    outputs = benchmarks.correctness._Outputs
    mine, theirs = outputs([], [[-1.0, -2.0], [-3.0]]), outputs([], [[-1.0, -2.0], [-6.0]])
    assert benchmarks.correctness._error(mine, theirs, "float32") == 3.0
    assert benchmarks.correctness._error(mine, theirs, "bfloat16") == pytest.approx(3**0.5)


def test_a_window_is_where_all_sequences_decode(benchmarks: Benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [SimpleNamespace(num_computed=0, num_prompt=4, token_ids=[0] * 4) for _ in range(2)]
    scheduler, counts = SimpleNamespace(running=[]), {"tokens": 0}
    runner = SimpleNamespace(metrics=SimpleNamespace(counts=counts))
    watch = benchmarks.engine._Watch(SimpleNamespace(scheduler=scheduler, runner=runner), 2)
    clock = iter((10.0, 13.0, 15.0))
    monkeypatch.setattr(benchmarks.engine.time, "perf_counter", lambda: next(clock))
    steps = ((1, 4, 0), (2, 8, 0), (2, 10, 5), (2, 12, 6), (2, 14, 7), (1, 15, 8))  # running, tokens so far, computed
    for running, tokens, computed in steps:
        scheduler.running, counts["tokens"] = sequences[:running], tokens
        for each in sequences:
            each.num_computed, each.token_ids = computed, [0] * max(4, computed)
        watch.look()
    assert watch.window() == (5.0, 4, 6.0)  # from the third step to the fifth
    assert watch.window().tokens_per_s == 0.8


def test_bytes_tell_log_probabilities_apart(benchmarks: Benchmarks) -> None:
    def choice(logprob: float) -> Choice:
        return Choice(0, (5,), "x", "length", (TokenLogprob(5, logprob),))

    digest = benchmarks.engine.digest_bytes
    assert digest([choice(-1.0)]) == digest([choice(-1.0)])
    assert digest([choice(-1.0)]) != digest([choice(float(np.nextafter(-1.0, 0)))])
