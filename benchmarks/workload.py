"""The workloads of the throughput benchmark: spans of documentation prose in the model's own tokens."""

import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import NamedTuple

from hpcinfer.data.tokenizer import Tokenizer

SEED = 1234


class Recipe(NamedTuple):
    """How a workload is made."""

    prompts: int
    lengths: tuple[int, int]  # tokens of a prompt behind the shared prefix, both included
    output_tokens: int  # of each prompt
    prefix_tokens: int = 0  # shared by all prompts
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may come to."""
        return self.prefix_tokens + self.lengths[1] + self.output_tokens


RECIPES = {
    "W1": Recipe(64, (32, 256), 64),
    "long-prompts": Recipe(16, (2000, 2000), 32),
    "long-outputs": Recipe(64, (32, 32), 512),
    "prefix-heavy": Recipe(200, (16, 64), 32, prefix_tokens=1000),  # as few-shot evaluation has it
    "single": Recipe(1, (32, 32), 1024),  # long enough to hide the start of a job
    "sampled": Recipe(64, (32, 256), 64, temperature=0.8, top_p=0.95),  # W1, as most chat models ask for it
}


class Workload(NamedTuple):
    """What every engine computes: so many tokens for each prompt, also after an end-of-sequence token."""

    prompts: list[list[int]]
    output_tokens: int  # of each prompt
    prefix_tokens: int  # shared by all prompts
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def sampling(self) -> str:
        """How tokens are chosen."""
        return f"temperature {self.temperature}, top-p {self.top_p}" if self.temperature > 0 else "greedy"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def all_output_tokens(self) -> int:
        """Tokens of all outputs."""
        return len(self.prompts) * self.output_tokens


def make_workload(tokenizer: Tokenizer, recipe: Recipe) -> Workload:
    """Cut prompts of random lengths, and the prefix, out of the documentation that comes with Python."""
    topics = pydoc_data.topics.topics
    token_ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)
    generator = random.Random(SEED)
    prefix = token_ids[: recipe.prefix_tokens]
    prompts = []
    for _ in range(recipe.prompts):
        length, start = generator.randint(*recipe.lengths), generator.randrange(len(token_ids) - recipe.lengths[1])
        prompts.append(prefix + token_ids[start : start + length])
    return Workload(prompts, recipe.output_tokens, recipe.prefix_tokens, recipe.temperature, recipe.top_p)


def write_workload(workload: Workload, folder: Path) -> tuple[Path, Path]:
    """Write it as input of a job and as one JSON object."""
    job_input, whole = folder / "prompts.jsonl", folder / "workload.json"
    job_input.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in workload.prompts))
    whole.write_text(json.dumps(workload._asdict()))
    return job_input, whole
