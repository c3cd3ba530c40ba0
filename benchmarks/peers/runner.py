"""What the runners of all peers share: their command line, the time that counts, and the result file.

Runs in the peers' own environments: only the standard library is there for sure.
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TokenIds = list[list[int]]


@dataclass(frozen=True)
class Task:
    """What a runner is asked to do: so many tokens for each prompt; an end-of-sequence token ends nothing."""

    model: Path  # in the form that the peer reads
    prompts: TokenIds
    output_tokens: int  # of each prompt
    result: Path
    threads: int
    precision: str  # f32 or int8, of the weights
    reuses_prefixes: bool
    wants_margins: bool  # only transformers knows them
    temperature: float  # 0 is greedy
    top_p: float

    @property
    def warm_up_prompts(self) -> TokenIds:
        """Two prompts that share no prefix with those of the workload, of the same lengths."""
        return [prompt[::-1] for prompt in self.prompts[:2]]

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and its output."""
        return max(map(len, self.prompts)) + self.output_tokens

    @property
    def cache_tokens(self) -> int:
        """Tokens of the KV cache, if all prompts were served at once."""
        return sum(map(len, self.prompts)) + len(self.prompts) * self.output_tokens


def read_task(description: str) -> Task:
    """Read the command line and the workload."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("workload", type=Path, help="{prompts: [[ids]], output_tokens: N, temperature: T, top_p: P}")
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("f32", "int8"), default="f32")
    parser.add_argument("--reuse-prefixes", action="store_true")
    parser.add_argument("--margins", action="store_true")
    args = parser.parse_args()
    workload = json.loads(args.workload.read_text())
    return Task(
        args.model, workload["prompts"], workload["output_tokens"], args.result, args.threads, args.precision,
        args.reuse_prefixes, args.margins, workload.get("temperature", 0.0), workload.get("top_p", 1.0),
    )  # fmt: skip


def measure(task: Task, generate: Callable[[TokenIds, int], TokenIds]) -> tuple[float, TokenIds]:
    """Warm up, then run the workload; seconds, and the outputs in the order of the prompts."""
    generate(task.warm_up_prompts, min(4, task.output_tokens))
    start = time.perf_counter()
    outputs = generate(task.prompts, task.output_tokens)
    seconds = time.perf_counter() - start
    lengths = {len(output) for output in outputs}
    assert lengths == {task.output_tokens} and len(outputs) == len(task.prompts), (lengths, len(outputs))
    return seconds, outputs


def write_result(task: Task, measured: tuple[float, TokenIds], packages: list[str], **more: object) -> None:
    """Write what came of it as one JSON object."""
    seconds, outputs = measured
    result = {
        "seconds": seconds,
        "prompt_tokens": sum(map(len, task.prompts)),
        "output_tokens": sum(map(len, outputs)),
        "token_ids": outputs,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        **more,
    }
    task.result.write_text(json.dumps(result))
