"""`hpcinfer convert` as a user starts it: alone, on several ranks, killed in the middle, several at once."""

import time
from pathlib import Path

from golden import DEMO_MODEL, assert_refused, demo_prompts, varied_rows, write_rows
from jobs import run_job, start_job

from hpcinfer.weights.reader import Store


def test_ranks_share_the_conversion_and_change_no_byte(tmp_path: Path) -> None:
    for ranks in (0, 3):
        assert run_job(ranks, DEMO_MODEL, tmp_path / f"store-{ranks}", module="hpcinfer.convert").rc == 0
    alone, shared = Store.open(tmp_path / "store-0"), Store.open(tmp_path / "store-3")
    shared.verify()
    assert alone.digest == shared.digest


def test_existing_destination_is_refused_once(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    run = run_job(2, DEMO_MODEL, tmp_path / "store", module="hpcinfer.convert")
    assert_refused(run, "ConfigError", str(tmp_path / "store"))


def test_killed_conversion_leaves_nothing_that_looks_like_a_store(tmp_path: Path) -> None:
    for delay in (0.7, 1.1, 1.5):
        job = start_job(2, DEMO_MODEL, tmp_path / "store", module="hpcinfer.convert")
        time.sleep(delay)
        job.kill()
        if (tmp_path / "store").exists():
            Store.open(tmp_path / "store").verify()
            return
    assert run_job(2, DEMO_MODEL, tmp_path / "store", module="hpcinfer.convert").rc == 0
    Store.open(tmp_path / "store").verify()


def test_jobs_that_start_at_once_share_one_converted_store(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "in.jsonl", varied_rows(demo_prompts(2)))
    environment = {"HPCINFER_CACHE": str(tmp_path / "cache")}
    jobs = [
        start_job(1, "--model", DEMO_MODEL, "--input", prompts, "--output", tmp_path / f"{i}.jsonl", env=environment)
        for i in range(2)
    ]
    assert [job.wait().rc for job in jobs] == [0, 0]
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    stores = [path for path in (tmp_path / "cache").iterdir() if ".tmp-" not in path.name]
    assert len(stores) == 1
