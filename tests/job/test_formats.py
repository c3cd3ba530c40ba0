"""Rows in, records out: every input format, error rows in place, retry, status and partial merge."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden import DEMO_MODEL, assert_refused, read_output, run_to_output, write_rows
from jobs import run_job, start_job, wait_until


def openai_row(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    """One row of an OpenAI batch file."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "demo", "max_tokens": 6, **body}}


CHAT = [{"role": "user", "content": "What does os.path.join do?"}]
BATCH: list[Any] = [
    openai_row("a", "/v1/completions", prompt="Return the list", temperature=0),
    openai_row("b", "/v1/chat/completions", messages=CHAT, temperature=0, logprobs=True, top_logprobs=2),
    "this is no JSON",
    openai_row("c", "/v1/chat/completions", messages=CHAT, tools=[{"type": "function"}]),
    openai_row("d", "/v1/completions", prompt="x " * 5000),
    openai_row("e", "/v1/completions", prompt="Return the list", temperature=0, flavour="sweet"),
    openai_row("f", "/v1/completions", prompt="Return the list", n=2, seed=1),
    openai_row("a", "/v1/completions", prompt="Return the list", temperature=0),
]


@pytest.fixture(scope="module")
def batch(folder: Path) -> Path:
    """A batch with errors, answered; its output."""
    prompts = write_rows(folder / "batch.jsonl", BATCH)
    run_to_output(folder / "batch", 2, DEMO_MODEL, prompts)
    return folder / "batch" / "out.jsonl"


def test_openai_batch_gives_openai_records_in_input_order(batch: Path) -> None:
    lines = read_output(batch).lines
    assert [line.get("custom_id") for line in lines] == ["a", "b", None, "c", "d", "e", "f", "a"]
    first = lines[0]["response"]
    assert first["status_code"] == 200
    assert first["body"]["object"] == "text_completion"
    assert first["body"]["usage"]["completion_tokens"] <= 6
    assert first["body"]["model"] == "demo"
    chat = lines[1]["response"]["body"]["choices"][0]
    assert chat["message"]["role"] == "assistant"
    assert len(chat["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert [choice["index"] for choice in lines[6]["response"]["body"]["choices"]] == [0, 1]
    assert lines[0]["response"]["body"]["choices"] == lines[7]["response"]["body"]["choices"]


def test_bad_rows_become_error_records_that_name_the_cause(batch: Path) -> None:
    lines = read_output(batch).lines
    assert "tools" in lines[3]["error"]["message"]
    assert lines[4]["error"]["code"] == "prompt_too_long"
    assert "flavour" in lines[5]["error"]["message"]
    assert all(lines[i].get("response") is None for i in (2, 3, 4, 5))


def test_exit_code_tells_of_errors_only_when_asked(batch: Path, folder: Path) -> None:
    arguments = ["--model", DEMO_MODEL, "--input", folder / "batch.jsonl", "--output", batch]
    assert run_job(0, *arguments).rc == 0
    assert run_job(0, *arguments, "--fail-on-error").rc == 1


def test_retry_computes_only_error_rows_again(batch: Path, folder: Path) -> None:
    before = batch.read_bytes()
    parts = set((batch.parent / "out.jsonl.job" / "parts").glob("*.jsonl"))
    arguments = ["--model", DEMO_MODEL, "--input", folder / "batch.jsonl", "--output", batch]
    assert run_job(2, *arguments, "--retry-errors").rc == 0
    new = set((batch.parent / "out.jsonl.job" / "parts").glob("*.jsonl")) - parts
    assert sum(len(path.read_bytes().splitlines()) for path in new) == 4
    assert batch.read_bytes() == before


def test_text_and_gzip_give_the_same_answers(folder: Path) -> None:
    texts = ["Return the list", "The file is", "Größe und Straße"]
    (folder / "in.txt").write_text("\n".join(texts) + "\n\n")
    (folder / "in.txt.gz").write_bytes(gzip.compress((folder / "in.txt").read_bytes()))
    flags = ["--temperature", "0", "--max-tokens", "5"]
    plain = run_to_output(folder / "plain", 0, DEMO_MODEL, folder / "in.txt", *flags)
    packed = run_to_output(folder / "packed", 2, DEMO_MODEL, folder / "in.txt.gz", *flags)
    jsonl = write_rows(folder / "in.jsonl", [{"prompt": text} for text in texts])
    assert len(plain.lines) == 3
    assert plain.digest == packed.digest
    assert plain.digest == run_to_output(folder / "jsonl", 0, DEMO_MODEL, jsonl, *flags).digest


def test_defaults_are_told_with_their_origin(folder: Path) -> None:
    manifest = json.loads((folder / "plain" / "out.jsonl.job" / "manifest.json").read_text())
    assert manifest["sampling"]["max_tokens"] == 5
    assert manifest["informative"]["origins"]["max_tokens"] == "command line"
    assert manifest["informative"]["origins"]["top_p"] == "hpcinfer"


def test_empty_input_is_refused(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("\n\n")
    run = run_job(2, "--model", DEMO_MODEL, "--input", folder / "empty.jsonl", "--output", folder / "empty.out")
    assert_refused(run, "ConfigError", "empty.jsonl")


def test_status_and_partial_merge_work_while_the_job_runs(folder: Path) -> None:
    prompts = write_rows(folder / "long.jsonl", [{"prompt": f"{i}. Return", "max_tokens": 40} for i in range(600)])
    output = folder / "long.out"
    slowly = ("-dp", "2", "--max-num-seqs", "1")
    job = start_job(2, "--model", DEMO_MODEL, "--input", prompts, "--output", output, *slowly)
    parts = Path(f"{output}.job", "parts")
    wait_until(lambda: sum(len(path.read_bytes().splitlines()) for path in parts.glob("*.jsonl")) > 5)
    status = subprocess.run([sys.executable, "-m", "hpcinfer", "status", output], capture_output=True, text=True)
    assert status.returncode == 0, status.stderr
    assert "600" in status.stdout
    merge = [sys.executable, "-m", "hpcinfer", "merge", "--partial", output]
    assert subprocess.run(merge, capture_output=True).returncode == 0
    partial = [json.loads(line) for line in Path(f"{output}.partial").read_text().splitlines()]
    assert partial == sorted(partial, key=lambda line: line["row"])
    assert job.is_running
    assert job.wait().rc == 0
    assert len(output.read_text().splitlines()) == 600
    assert partial
