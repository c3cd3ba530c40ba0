"""Batches for kernels and stages in tests: sequences in shuffled KV blocks, run in any chunks and any company."""

from typing import NamedTuple

import numpy as np

from hpcinfer.kernels.protocol import StepInput


class Chunk(NamedTuple):
    """Tokens [start, stop) of a sequence."""

    sequence: int
    start: int
    stop: int


def block_tables(lengths: list[int], block_size: int, seed: int = 0) -> tuple[list[np.ndarray], int]:
    """Shuffled blocks for sequences of these lengths, some blocks left unused: (tables, number of blocks)."""
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    blocks = np.random.default_rng(seed).permutation(num_blocks)
    return np.split(blocks, np.cumsum(counts))[:-1], num_blocks


def packed_step(
    chunks: list[Chunk], token_ids: list[np.ndarray], tables: list[np.ndarray], block_size: int
) -> StepInput:
    """One batch of chunks; the logits of all its tokens are asked for."""
    positions = [np.arange(chunk.start, chunk.stop) for chunk in chunks]
    slots = [
        tables[chunk.sequence][place // block_size] * block_size + place % block_size
        for chunk, place in zip(chunks, positions, strict=True)
    ]
    stops = np.array([chunk.stop for chunk in chunks])
    lengths = [len(place) for place in positions]
    used = [tables[c.sequence][: -(-c.stop // block_size)] for c in chunks]
    return StepInput(
        token_ids=np.concatenate([token_ids[chunk.sequence][chunk.start : chunk.stop] for chunk in chunks]),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        query_starts=np.cumsum([0, *lengths]),
        context_lens=stops,
        block_tables=np.concatenate(used),
        table_starts=np.cumsum([0, *map(len, used)]),
        logit_tokens=np.arange(sum(lengths)),
    )


def schedule(lengths: list[int], chunk: int, max_chunks: int, seed: int = 0) -> list[list[Chunk]]:
    """Batches of up to `max_chunks` chunks of up to `chunk` tokens, sequences in random company."""
    random = np.random.default_rng(seed)
    done, batches = [0] * len(lengths), []
    while open_ones := [s for s, length in enumerate(lengths) if done[s] < length]:
        batch = []
        for s in random.permutation(open_ones)[:max_chunks]:
            stop = min(lengths[s], done[s] + int(random.integers(1, chunk + 1)))
            batch.append(Chunk(int(s), done[s], stop))
            done[s] = stop
        batches.append(batch)
    return batches
