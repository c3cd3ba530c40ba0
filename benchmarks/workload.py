"""The prompts of the throughput benchmark: spans of documentation prose in the model's own tokens."""

import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import NamedTuple

from hpcinfer.data.tokenizer import Tokenizer

SEED = 1234
LENGTHS = (32, 256)  # tokens of a prompt, both included


class Workload(NamedTuple):
    """What every engine computes: so many greedy tokens for each prompt, also after an end-of-sequence token."""

    prompts: list[list[int]]
    output_tokens: int  # of each prompt

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def all_output_tokens(self) -> int:
        """Tokens of all outputs."""
        return len(self.prompts) * self.output_tokens


def make_workload(tokenizer: Tokenizer, num_prompts: int, output_tokens: int) -> Workload:
    """Cut prompts of random lengths out of the documentation that comes with Python."""
    topics = pydoc_data.topics.topics
    token_ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)
    generator = random.Random(SEED)
    prompts = []
    for _ in range(num_prompts):
        length, start = generator.randint(*LENGTHS), generator.randrange(len(token_ids) - LENGTHS[1])
        prompts.append(token_ids[start : start + length])
    return Workload(prompts, output_tokens)


def write_workload(workload: Workload, folder: Path) -> tuple[Path, Path]:
    """Write it as input of a job and as one JSON object."""
    job_input, whole = folder / "prompts.jsonl", folder / "workload.json"
    job_input.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in workload.prompts))
    whole.write_text(json.dumps(workload._asdict()))
    return job_input, whole
