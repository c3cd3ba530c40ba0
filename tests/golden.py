"""Jobs whose output must not depend on anything but store, input, options, seed and numerics profile."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jobs import CompletedRun, run_job

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO_MODEL = EXAMPLES / "demo_model"


class Output(NamedTuple):
    """What a job left."""

    digest: str  # SHA-256 of the output
    lines: list[dict[str, Any]]
    report: dict[str, Any]  # of its last run

    def counts(self, name: str) -> int:
        """Sum of a counter over all ranks."""
        return sum(rank["counts"].get(name, 0) for rank in self.report["ranks"])

    def peak(self, name: str) -> int:
        """Largest value of a peak over all ranks."""
        return max(rank["peaks"].get(name, 0) for rank in self.report["ranks"])


def varied_rows(prompts: Iterable[str]) -> list[dict[str, Any]]:
    """Give each prompt another kind of request: greedy, sampled, choices, stop strings, log-probabilities, scoring."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 12},
        {"temperature": 1.0, "max_tokens": 16},
        {"temperature": 0.8, "top_p": 0.9, "n": 2, "max_tokens": 12},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.02, "stop": ["the", "e r", "\n"], "max_tokens": 20},
        {"temperature": 0, "logprobs": 3, "max_tokens": 6},
        {"temperature": 0, "echo": True, "logprobs": 2, "max_tokens": 0},
        {"temperature": 1.2, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3,
         "min_tokens": 5, "max_tokens": 14, "seed": 11},
        {"temperature": 0, "logit_bias": {"20": 2.5}, "ignore_eos": True, "max_tokens": 18},
    ]  # fmt: skip
    return [{"prompt": prompt, **kinds[i % len(kinds)]} for i, prompt in enumerate(prompts)]


def demo_prompts(count: int) -> list[str]:
    """Plain prompts of the examples."""
    rows = map(json.loads, (EXAMPLES / "prompts.jsonl").read_text().splitlines())
    return [row["prompt"] for row in rows if "prompt" in row][:count]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows as JSONL; a string is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run_to_output(folder: Path, ranks: int, model: Path, prompts: Path, *flags: str, timeout: float = 120) -> Output:
    """Run a job in a new folder and read what it left; the job must end well."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "out.jsonl"
    run = run_job(ranks, "--model", model, "--input", prompts, "--output", output, *flags, timeout=timeout)
    assert run.rc == 0, run.stderr
    return read_output(output)


def read_output(output: Path) -> Output:
    """Read an output and the report of its last run."""
    data = output.read_bytes()
    reports = sorted(Path(f"{output}.job", "reports").iterdir())
    lines = [json.loads(line) for line in data.splitlines()]
    return Output(hashlib.sha256(data).hexdigest(), lines, json.loads(reports[-1].read_text()))


def assert_refused(run: CompletedRun, *words: str) -> None:
    """Check that a job was refused as a wrong one: exit code 2, and one message with these words, not one per rank."""
    assert run.rc == 2, (run.rc, run.stderr)
    for word in words:
        assert word in run.stderr, run.stderr
    assert run.stderr.count(words[0]) == 1, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
