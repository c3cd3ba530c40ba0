"""A wrong job is refused on all ranks within seconds, with one message; a failing rank ends all."""

import json
import shutil
import time
from pathlib import Path

import pytest
from golden import DEMO_MODEL, assert_refused, demo_prompts, varied_rows, write_rows
from jobs import run_job
from models import make_tiny_model


@pytest.fixture
def arguments(tmp_path: Path) -> list[str | Path]:
    """A job that would run."""
    prompts = write_rows(tmp_path / "in.jsonl", varied_rows(demo_prompts(4)))
    return ["--model", DEMO_MODEL, "--input", prompts, "--output", tmp_path / "out.jsonl"]


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (2, ["-tp", "3"], ["MeshError", "dp(1) * pp(1) * tp(3) = 3 != world size (2)"]),
        (4, ["-tp", "2", "-pp", "2", "-dp", "2"], ["MeshError", "world size (4)"]),
        (2, ["-pp", "0", "-tp", "2"], ["MeshError", "pipeline_parallel_size=0"]),
        (2, ["--no-such-option"], ["unrecognized arguments", "--no-such-option"]),
        (2, ["--max-num-seqs", "many"], ["--max-num-seqs", "many"]),
        (2, ["--model", "/nowhere/model"], ["ModelError", "/nowhere/model"]),
        (2, ["--model", "some-org/some-model"], ["ModelError", "some-org/some-model", "hf download"]),
        (2, ["--input", "/nowhere/in.jsonl"], ["ConfigError", "/nowhere/in.jsonl"]),
        (2, ["--output", "/dev/null/out.jsonl"], ["ConfigError", "/dev/null"]),
        (2, ["--kv-cache-memory", "64KiB"], ["ConfigError", "4.0 MiB per rank"]),
        (2, ["--kv-cache-memory", "much"], ["ConfigError", "much"]),
        (2, ["--max-model-len", "100000"], ["ConfigError", "100000"]),
        (2, ["--temperature", "-1"], ["ConfigError", "temperature"]),
        (2, ["--block-size", "0"], ["ConfigError", "--block-size"]),
        (3, ["-tp", "2", "--spare-ranks", "1"], ["--spare-ranks 1, but this MPI ends the job", "--with-ft ulfm"]),
        (2, ["--template-date", "tomorrow"], ["ConfigError", "tomorrow"]),
    ],
)
def test_wrong_option_is_refused(
    ranks: int, flags: list[str], words: list[str], arguments: list[str | Path], tmp_path: Path
) -> None:
    start = time.monotonic()
    assert_refused(run_job(ranks, *arguments, *flags), *words)
    assert time.monotonic() - start < 30
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-tp", "4"], ["MeshError", "tensor_parallel_size=4", "grains (2)"]),
        (["-pp", "4"], ["MeshError", "pipeline_parallel_size=4", "layers"]),
    ],
)
def test_mesh_that_the_model_does_not_allow_is_refused(
    flags: list[str], words: list[str], arguments: list[str | Path], tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "model", "llama")
    assert run_job(0, folder, tmp_path / "store", "--grains", "2", module="hpcinfer.convert").rc == 0
    assert_refused(run_job(4, *arguments, "--model", tmp_path / "store", *flags), *words)


def test_world_smaller_than_the_slurm_job_is_refused(arguments: list[str | Path]) -> None:
    assert_refused(run_job(2, *arguments, env={"SLURM_NTASKS": "4"}), "MeshError", "SLURM_NTASKS", "4")
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    assert run_job(0, *arguments, env=srun).rc == 2  # an MPI that does not fit the launcher


def test_output_without_a_job_directory_is_not_overwritten(arguments: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious\n")
    assert_refused(run_job(2, *arguments), "ConfigError", "out.jsonl", "another --output")
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_unsupported_architecture_is_refused_by_name(arguments: list[str | Path], tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["FuturForCausalLM"]}))
    run = run_job(2, *arguments, "--model", tmp_path / "model")
    assert_refused(run, "ModelError", "FuturForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")


def test_damaged_store_ends_all_ranks_and_is_named(arguments: list[str | Path], tmp_path: Path) -> None:
    store = tmp_path / "model.store"
    assert run_job(0, DEMO_MODEL, store, module="hpcinfer.convert").rc == 0
    file = sorted(store.glob("layer*"))[1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run = run_job(2, *arguments, "--model", store, "-tp", "2")
    assert run.rc == 1
    assert "StoreError" in run.stderr
    assert file.name in run.stderr


def test_exception_on_one_rank_ends_all_and_is_shown(arguments: list[str | Path]) -> None:
    start = time.monotonic()
    run = run_job(2, *arguments, "-pp", "2", module="broken_rank", cwd=Path(__file__).parent)
    assert run.rc != 0
    assert "rank 1/2 on " in run.stderr
    assert "Traceback" in run.stderr
    assert "this rank is broken" in run.stderr
    assert time.monotonic() - start < 30
