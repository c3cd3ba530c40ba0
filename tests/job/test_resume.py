"""Kill the whole job at any moment, run the same command again: the same file, finished rows not computed again."""

import shutil
import time
from pathlib import Path

import pytest
from golden import (
    DEMO_MODEL,
    Output,
    assert_refused,
    demo_prompts,
    read_output,
    run_to_output,
    varied_rows,
    write_rows,
)
from jobs import Job, run_job, start_job, wait_until

NUM_ROWS = 600
SLOWLY = ("--max-num-seqs", "1")  # so that there is time to kill a job; changes no result
FLAGS = ("--seed", "3", "--lease-timeout", "30")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """Enough rows that a job runs for some seconds."""
    return write_rows(folder / "in.jsonl", varied_rows(demo_prompts(60) * (NUM_ROWS // 60)))


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """The undisturbed run."""
    return run_to_output(folder / "whole", 2, DEMO_MODEL, prompts, *FLAGS)


def job_arguments(folder: Path, prompts: Path) -> list[str | Path]:
    """Arguments of a job in a folder."""
    folder.mkdir(exist_ok=True)
    return ["--model", DEMO_MODEL, "--input", prompts, "--output", folder / "out.jsonl", *FLAGS]


def num_finished(folder: Path) -> int:
    """Rows in the journal."""
    return sum(
        (path.stat().st_size - 32) // 32 for path in Path(folder, "out.jsonl.job", "parts").glob("*.sidecar")
    )


def kill_at(job: Job, folder: Path, rows: int) -> None:
    """Kill the launcher and all ranks as soon as so many rows are in the journal."""
    wait_until(lambda: num_finished(folder) >= rows or not job.is_running)
    job.kill()


def test_killed_job_ends_with_the_same_bytes_on_another_mesh(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "killed"
    arguments = job_arguments(place, prompts)
    kill_at(start_job(2, *arguments, *SLOWLY, "-tp", "2"), place, 20)
    done = num_finished(place)
    assert 0 < done < NUM_ROWS
    assert not (place / "out.jsonl").exists()
    assert run_job(3, *arguments, "-pp", "3").rc == 0
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest
    assert output.report["ranks"][0]["rows"]["finished"] <= NUM_ROWS - done


@pytest.mark.time_limit(300)
def test_job_killed_again_and_again_loses_nothing(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "again"
    arguments = job_arguments(place, prompts)
    job = start_job(2, *arguments, "-dp", "2")
    wait_until(lambda: (place / "out.jsonl.job").exists())
    job.kill()
    done = [num_finished(place)]
    for ranks, flags in ((2, ["-dp", "2"]), (2, ["-pp", "2"])):
        kill_at(start_job(ranks, *arguments, *SLOWLY, *flags), place, done[-1] + 1)
        done.append(num_finished(place))
    assert 0 == done[0] < done[1] < done[2] < NUM_ROWS
    assert run_job(2, *arguments).rc == 0
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest
    assert sum(rank["rows"]["finished"] for rank in output.report["ranks"]) == NUM_ROWS - done[-1]


@pytest.mark.time_limit(300)
def test_job_killed_at_chosen_events_loses_nothing(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "events"
    arguments = job_arguments(place, prompts)
    job = place / "out.jsonl.job"

    def die(event: str) -> None:
        assert run_job(1, event, *arguments, module="killed_rank", cwd=Path(__file__).parent).rc != 0

    die("claimed")
    assert len(list(job.glob("claims/*/*.g1"))) == 3
    die("data-synced")
    assert list(job.glob("claims/*/*.g2"))
    assert num_finished(place) == 0 < sum(path.stat().st_size for path in job.glob("parts/*.jsonl"))
    die("output-renamed")
    assert num_finished(place) == NUM_ROWS
    assert (place / "out.jsonl").exists()
    assert not (job / "complete.json").exists()
    run = run_job(1, *arguments)
    assert run.rc == 0
    assert num_finished(place) == NUM_ROWS
    assert (job / "complete.json").exists()
    assert read_output(place / "out.jsonl").digest == whole.digest


def test_complete_job_is_not_computed_again(folder: Path, prompts: Path, whole: Output) -> None:
    before = list((folder / "whole" / "out.jsonl.job" / "parts").iterdir())
    run = run_job(2, *job_arguments(folder / "whole", prompts))
    assert run.rc == 0
    assert "complete" in run.stderr
    assert list((folder / "whole" / "out.jsonl.job" / "parts").iterdir()) == before


def test_lost_output_is_merged_again(folder: Path, prompts: Path, whole: Output) -> None:
    shutil.copytree(folder / "whole", folder / "merged")
    (folder / "merged" / "out.jsonl").unlink()
    assert run_job(0, *job_arguments(folder / "merged", prompts)).rc == 0
    assert read_output(folder / "merged" / "out.jsonl").digest == whole.digest


def test_two_jobs_share_the_work(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "shared"
    arguments = job_arguments(place, prompts)
    jobs = [start_job(2, *arguments, "-tp", "2"), start_job(1, *arguments)]
    assert [job.wait().rc for job in jobs] == [0, 0]
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest
    assert num_finished(place) == NUM_ROWS


def test_second_job_takes_over_from_a_killed_one(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "helper"
    arguments = job_arguments(place, prompts)
    first = start_job(2, *arguments, *SLOWLY, "-dp", "2")
    wait_until(lambda: num_finished(place) >= 10)
    second = start_job(1, *arguments)
    time.sleep(3)
    first.kill()
    assert second.wait().rc == 0
    assert read_output(place / "out.jsonl").digest == whole.digest


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "4"], ["ManifestError", "seed", "3", "4"]),
        (["--max-tokens", "8"], ["ManifestError", "sampling.max_tokens", "256", "8"]),
        (["--dtype", "bfloat16"], ["ManifestError", "numerics.dtype"]),
        (["--max-model-len", "512"], ["ManifestError", "model.max_model_len", "1024", "512"]),
    ],
)
def test_another_option_is_refused(
    flags: list[str], words: list[str], folder: Path, prompts: Path, whole: Output
) -> None:
    assert_refused(run_job(2, *job_arguments(folder / "whole", prompts), *flags), *words)


def test_another_input_is_refused(folder: Path, prompts: Path, whole: Output) -> None:
    other = write_rows(folder / "other.jsonl", varied_rows(demo_prompts(3)))
    run = run_job(2, *job_arguments(folder / "whole", prompts), "--input", other)
    assert_refused(run, "ManifestError", "input.digest")
