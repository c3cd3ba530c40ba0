"""What a sequence asks of its next row of logits: changes, filters, the counter-based generator. Pure functions."""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.kernels.protocol import Changes

if TYPE_CHECKING:
    from hpcinfer.engine.sequence import Sequence

_KEY = struct.Struct("<qqqq")


class TokenScore(NamedTuple):
    """Log-probability of a token, and of the most likely ones at its position: highest first, then lowest id."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, row: int, choice: int, position: int) -> float:
    """Draw from [0, 1), a function of the four numbers alone (a hash in counter mode, 53 bits)."""
    digest = blake2b(_KEY.pack(seed, row, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def changes_for(sequence: Sequence, num_output: int, eos_ids: tuple[int, ...], ids: range) -> Changes:
    """What min_tokens, logit_bias and penalties do to the logits of these ids behind so many output tokens."""
    params = sequence.request.sampling
    forbids = num_output < params.min_tokens
    forbidden = _inside((*eos_ids, *params.stop_token_ids) if forbids else (), ids)
    seen = _inside(sequence.token_ids if params.repetition_penalty != 1.0 else (), ids)
    output = _inside(sequence.output_ids if params.presence_penalty or params.frequency_penalty else (), ids)
    biased = _inside([token_id for token_id, _ in params.logit_bias], ids)
    places = np.unique(np.concatenate((forbidden, seen, output, biased)))
    biases, factors = np.zeros(len(places), np.float32), np.ones(len(places), np.float32)
    values = [bias for token_id, bias in params.logit_bias if token_id in ids]
    np.add.at(biases, np.searchsorted(places, biased), np.array(values, np.float32))
    biases[np.searchsorted(places, forbidden)] = -np.inf
    factors[np.searchsorted(places, seen)] = params.repetition_penalty
    counts = np.bincount(np.searchsorted(places, output), minlength=len(places))
    penalties = np.where(counts > 0, params.frequency_penalty * counts + params.presence_penalty, 0.0)
    return Changes(places, biases, factors, penalties.astype(np.float32))


def _inside(token_ids: tuple[int, ...] | list[int], ids: range) -> np.ndarray:
    """Places among some ids of those tokens that are there."""
    local = np.asarray(token_ids, np.int64) - ids.start
    return local[(local >= 0) & (local < len(ids))]
