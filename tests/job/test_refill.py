"""A survivor takes the weights that it lacks from ranks of another replica while these go on."""

import pytest
from golden import DEMO_MODEL, demo_prompts, read_output, run_to_output, varied_rows, write_rows
from jobs import fault_tolerance, start_job, wait_until
from stages import native_was_built

FLAGS = ("--seed", "3", "--max-num-seqs", "2", "--lease-timeout", "30", "--kernels", "native")


@pytest.mark.skipif(not native_was_built(), reason="the native kernels were not built")
def test_a_survivor_refills_from_a_sister_replica(folder):
    flags, prompts = fault_tolerance(), write_rows(folder / "in.jsonl", varied_rows(demo_prompts(36) * 10))
    whole, out = run_to_output(folder / "whole", 1, DEMO_MODEL, prompts, *FLAGS), folder / "out.jsonl"
    job = start_job(4, "--model", DEMO_MODEL, "--input", prompts, "--output", out, "-dp", "2", "-tp", "2",
                    "--refill", "sister", *FLAGS, flags=flags)  # fmt: skip
    parts = folder / "out.jsonl.job" / "parts"
    wait_until(lambda: any(path.stat().st_size for path in parts.glob("*.jsonl")) or not job.is_running)
    assert job.kill_rank(1), job.stderr
    run = job.wait(100)
    assert run.rc == 0 and "Traceback" not in run.stderr, run.stderr
    output = read_output(out)
    assert output.digest == whole.digest
    recoveries = [each for rank in output.report["ranks"] for each in rank["recoveries"]]
    assert len(recoveries) == 1 and recoveries[0]["mesh"] == "dp=1 pp=1 tp=1", recoveries
    assert recoveries[0]["bytes_sister"] == recoveries[0]["bytes_own"] > 10 * recoveries[0]["bytes_store"]
