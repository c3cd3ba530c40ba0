"""Jobs on a GPU: the output is the same, byte for byte, whatever the batch, the blocks, the graphs and the mesh."""

import functools
import json
from typing import NamedTuple

import pytest
from golden import DEMO_MODEL, Output, demo_prompts, run_to_output, varied_rows, write_rows
from jobs import run_job

SETTINGS = {
    "again": [],
    "one sequence at a time": ["--max-num-seqs", "1"],
    "seven sequences": ["--max-num-seqs", "7", "--block-size", "8"],
    "chunks of 48 tokens": ["--max-num-batched-tokens", "48", "--block-size", "64"],
    "a small cache": ["--kv-cache-memory", "800KiB", "--block-size", "2"],
    "no graphs": ["--no-cuda-graphs"],
    "no graphs, seven sequences": ["--no-cuda-graphs", "--max-num-seqs", "7"],
    "two batches in flight": ["--micro-batches", "2"],
}
MESHES = {"tp=2": ["-tp", "2"], "tp=3": ["-tp", "3"], "pp=2": ["-pp", "2"], "tp=2, pp=2": ["-tp", "2", "-pp", "2"],
          "dp=2": ["-dp", "2"]}  # fmt: skip
RANKS = {"tp=2": 2, "tp=3": 3, "pp=2": 2, "tp=2, pp=2": 4, "dp=2": 2}
QUANTISED = ("int8", "int4", "fp8")


class Answer(NamedTuple):
    """What came of a job."""

    output: Output
    numerics: dict[str, str]  # its profile

    @property
    def digest(self) -> str:
        """SHA-256 of the output."""
        return self.output.digest


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory):
    """Runs a job on the GPU, each question once."""
    folder = tmp_path_factory.mktemp("answers")
    prompts = write_rows(folder / "in.jsonl", varied_rows(demo_prompts(24)))
    assert run_job(0, DEMO_MODEL, folder / "none.store", module="hpcinfer.convert").rc == 0
    for kind in QUANTISED:
        argv = ("--quantize", kind, DEMO_MODEL, folder / f"{kind}.store")
        assert run_job(0, *argv, module="hpcinfer.convert").rc == 0

    @functools.cache
    def ask(ranks: int, flags: tuple[str, ...], quantised: str = "none") -> Answer:
        name = "-".join([str(ranks), quantised, *(flag.strip("-") for flag in flags)])
        shared = ("--device", "cuda", "--seed", "7", "--ranks-per-gpu", str(max(1, ranks)), *flags)
        output = run_to_output(folder / name, ranks, folder / f"{quantised}.store", prompts, *shared)
        manifest = json.loads((folder / name / "out.jsonl.job" / "manifest.json").read_text())
        return Answer(output, manifest["numerics"])

    return ask


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_changes_a_byte(job, name):
    extra = ("--max-num-seqs", "63") if name == "again" else ()
    assert job(0, (*SETTINGS[name], *extra)).digest == job(0, ()).digest


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("name", MESHES)
def test_no_mesh_changes_a_byte(job, name):
    assert job(RANKS[name], tuple(MESHES[name])).digest == job(0, ()).digest


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("kind", QUANTISED)
def test_no_batch_or_mesh_changes_a_byte_of_a_quantised_model(job, kind):
    whole = job(0, ("--kv-cache-dtype", "int8"), kind).digest
    assert job(0, ("--kv-cache-dtype", "int8", "--max-num-seqs", "3"), kind).digest == whole
    assert job(2, ("--kv-cache-dtype", "int8", "-tp", "2"), kind).digest == whole


@pytest.mark.time_limit(300)
def test_a_small_cache_preempts(job):
    assert job(0, tuple(SETTINGS["a small cache"])).output.counts("preemptions") > 0


@pytest.mark.time_limit(300)
def test_faster_kernels_have_a_profile_of_their_own(job):
    exact, fast = job(0, ()), job(0, ("--no-reproducible",))
    assert exact.numerics != fast.numerics and len(fast.output.lines) == len(exact.output.lines)
