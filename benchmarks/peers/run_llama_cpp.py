"""llama.cpp on a workload, through llama_cpp_bulk.cpp: continuous batching, at most 32 sequences at once.

    python run_llama_cpp.py MODEL.gguf WORKLOAD.json RESULT.json --threads 2 --precision int8

MODEL.gguf is what prepare_llama_cpp.py made. Prefixes are not reused. The time is that of the driver, without loading
and its own warm-up.
"""

import subprocess
import sys
from pathlib import Path

from runner import Task, TokenIds, read_task, write_result

_MAX_NUM_SEQS = 32
_MAX_NUM_BATCHED_TOKENS = 512


def main() -> None:
    """Generate, write the result."""
    task = read_task(__doc__ or "")
    assert task.temperature == 0, "the driver is greedy"
    seconds, *rows = run_driver(task).splitlines()
    outputs: TokenIds = [[int(token_id) for token_id in row.split()] for row in rows]
    assert [len(output) for output in outputs] == [task.output_tokens] * len(task.prompts), outputs
    write_result(task, (float(seconds), outputs), [], versions={"llama-cpp-python": source_version()})


def run_driver(task: Task) -> str:
    """Run the driver: prompts go in as a line of ids each; out come the seconds, then a line of ids each."""
    program = Path(sys.executable).with_name("llama_cpp_bulk")
    numbers = [task.output_tokens, _MAX_NUM_SEQS, task.max_length, _MAX_NUM_BATCHED_TOKENS, task.threads]
    prompts = "".join(" ".join(map(str, prompt)) + "\n" for prompt in task.prompts)
    argv = [str(program), str(task.model), *map(str, numbers)]
    run = subprocess.run(argv, input=prompts, stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout


def source_version() -> str:
    """Version of the package that brought llama.cpp's sources."""
    lines = Path(sys.prefix, "src", "PKG-INFO").read_text().splitlines()
    return next(line for line in lines if line.startswith("Version:")).split()[1]


if __name__ == "__main__":
    main()
