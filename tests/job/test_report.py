"""What a run leaves for people: report, page, trace."""

import hashlib
import json
from html.parser import HTMLParser

import pytest
from golden import DEMO_MODEL, demo_prompts, write_rows
from jobs import fault_tolerance, run_job, start_job, wait_until

KEYS = {"format", "asked", "model", "software", "precision", "seed", "files", "run", "ranks", "nodes", "energy",
        "usage", "time", "over_time", "balance", "bounds", "events", "slow_ranks", "bytes_read", "methods"}  # fmt: skip
SVG = "http://www.w3.org/2000/svg"  # the name of a language, not an address


def digest(data):
    """As the manifest has it."""
    blocks = [hashlib.sha256(data[i : i + (16 << 20)]).digest() for i in range(0, len(data), 16 << 20)]
    return hashlib.sha256(b"".join(blocks)).hexdigest()


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "in.jsonl", [{"prompt": each, "max_tokens": 40} for each in demo_prompts(48) * 2])


def test_run_leaves_a_report_a_page_and_a_trace(tmp_path, prompts):
    output, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.job"
    files = ("--model", DEMO_MODEL, "--input", prompts, "--output", output)
    run = run_job(2, *files, "-tp", "2", "--trace", "--seed", "5")
    assert run.rc == 0, run.stderr
    report = json.loads((folder / "report.json").read_text())
    assert set(report) == KEYS and report["seed"] == report["asked"]["seed"] == 5
    (kept,) = (folder / "reports").iterdir()
    assert json.loads(kept.read_text()) == report
    for name, path in (("input", prompts), ("output", output)):
        data = path.read_bytes()
        assert report["files"][name]["sha256"] == hashlib.sha256(data).hexdigest()
        assert report["files"][name]["digest"] == digest(data)
    assert {each["phase"] for each in report["bounds"]} >= {"load", "run", "merge"}
    for rank, classes in zip(report["ranks"], report["time"]["by_rank"], strict=True):
        assert sum(classes.values()) == pytest.approx(rank["phases"]["run"], rel=0.05)
        assert rank["traffic"]["calls"] > 0 and classes["communication"] > 0
        assert rank["bytes_read"]["store"] > 0
    timeline = report["ranks"][0]["timeline"]
    assert sum(timeline["tokens"]) == report["usage"]["output_tokens"] > 0
    assert max(timeline["blocks"]) > 0 and sum(timeline["sequences"]) > 0
    assert "bound     " in run.stderr and str(folder / "report.html") in run.stderr
    page = (folder / "report.html").read_text()
    HTMLParser().feed(page)
    assert report["files"]["output"]["sha256"] in page and "http" not in page.replace(SVG, "")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["name"] == "forward"} == {0, 1}
    assert {"load", "run", "merge", "sequences"} <= {event["name"] for event in events}


def test_death_of_a_rank_is_in_the_report(tmp_path, prompts):
    folder = tmp_path / "out.jsonl.job"
    job = start_job(3, "--model", DEMO_MODEL, "--input", prompts, "--output", tmp_path / "out.jsonl", "-dp", "1", "-tp",
                    "2", "--spare-ranks", "1", "--max-num-seqs", "1", "--trace", flags=fault_tolerance())  # fmt: skip
    wait_until(lambda: any(folder.glob("parts/*.jsonl")) or not job.is_running)
    assert job.kill_rank(1), job.stderr
    run = job.wait(100)
    assert run.rc == 0, run.stderr
    report = json.loads((folder / "report.json").read_text())
    assert len(report["events"]) == 1 and report["events"][0]["seconds"] > 0
    assert "rank 1 of the world has died" in (folder / "report.html").read_text()
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "i"] == ["recovery"]
