"""The largest batch there may be, run once before the KV cache takes what a device has left.

What it takes is then set aside for all batches, and its kernels are compiled.
"""

from typing import Any

import numpy as np

from hpcinfer.config import EngineOptions
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.kernels.protocol import Kernels, StepInput
from hpcinfer.model.decoder import CacheShape, Stage


def take_step(stage: Stage, kernels: Kernels, step: StepInput, cache: list[Any]) -> None:
    """Run a stage on a batch, with a cache that lasts as long. Collective over tp."""
    stage.cache = cache
    hidden = None if stage.plan.is_first else kernels.zeros((len(step.positions), stage.config.hidden_size))
    stage.forward(step, hidden)
    stage.cache = []


def cache_for(step: StepInput, options: ReplicaOptions) -> CacheShape:
    """What holds the keys of one batch alone. Not collective."""
    return CacheShape(len(step.block_tables), options.engine.block_size, options.cache_dtype)


def largest_step(engine: EngineOptions, max_model_len: int) -> StepInput:
    """Prompts as long as may be, as many tokens as a batch may have, and as many rows of logits as sequences.

    Not collective."""
    num_tokens = engine.max_num_batched_tokens
    counts = [max_model_len] * (num_tokens // max_model_len)
    if rest := num_tokens - sum(counts):
        counts.append(rest)
    starts = np.cumsum([0, *counts])
    table_starts = np.cumsum([0, *(-(-count // engine.block_size) for count in counts)])
    places = [np.arange(count) for count in counts]
    slots = [start * engine.block_size + place for start, place in zip(table_starts, places, strict=False)]
    return StepInput(
        token_ids=np.zeros(num_tokens, np.int64),
        positions=np.concatenate(places),
        slots=np.concatenate(slots),
        query_starts=starts,
        context_lens=np.array(counts),
        block_tables=np.arange(table_starts[-1]),
        table_starts=table_starts,
        logit_tokens=np.arange(min(num_tokens, engine.max_num_seqs)),
    )
