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
_NONE = np.empty(0, np.int64)


class TokenScore(NamedTuple):
    """Log-probability of a token, and of the most likely ones at its position: highest first, then lowest id."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, row: int, choice: int, position: int) -> float:
    """Draw from [0, 1), a function of the four numbers alone (a hash in counter mode, 53 bits)."""
    digest = blake2b(_KEY.pack(seed, row, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class SeenTokens:
    """Distinct tokens of a sequence, and how often each is in its output; follows the sequence as it grows."""

    def __init__(self, num_prompt: int) -> None:
        self.ids = np.empty(0, np.int64)  # ascending
        self.counts = np.empty(0, np.int64)  # in the output, of each
        self._num_prompt, self._num_tokens = num_prompt, 0

    def follow(self, token_ids: list[int]) -> None:
        """Take in what is new of a sequence's tokens."""
        new, self._num_tokens = token_ids[self._num_tokens :], len(token_ids)
        if not len(self.ids) or len(new) > 4:
            self.ids, places = np.unique(np.array(token_ids, np.int64), return_inverse=True)
            self.counts = np.bincount(places[self._num_prompt :], minlength=len(self.ids))
            return
        for token_id in new:  # behind the prompt
            place = int(np.searchsorted(self.ids, token_id))
            if place < len(self.ids) and self.ids[place] == token_id:
                self.counts[place] += 1
            else:
                self.ids, self.counts = np.insert(self.ids, place, token_id), np.insert(self.counts, place, 1)

    def inside(self, ids: range, *, only_output: bool) -> tuple[np.ndarray, np.ndarray]:
        """Places among some ids of the tokens that are there, ascending, and their counts."""
        first, last = np.searchsorted(self.ids, (ids.start, ids.stop))
        places, counts = self.ids[first:last] - ids.start, self.counts[first:last]
        return (places[counts > 0], counts[counts > 0]) if only_output else (places, counts)


def changes_for(sequence: Sequence, num_output: int, eos_ids: tuple[int, ...], ids: range) -> Changes:
    """What min_tokens, logit_bias and penalties do to the logits of these ids behind so many output tokens."""
    params = sequence.request.sampling
    forbids = num_output < params.min_tokens
    forbidden = _inside((*eos_ids, *params.stop_token_ids) if forbids else (), ids)
    biased = _inside([token_id for token_id, _ in params.logit_bias], ids)
    seen, counts = _seen(sequence, ids)
    places = np.unique(np.concatenate((forbidden, seen, biased))) if len(forbidden) or len(biased) else seen
    biases, factors, penalties = np.zeros((3, len(places)), np.float32) + np.array([[0], [1], [0]], np.float32)
    values = [bias for token_id, bias in params.logit_bias if token_id in ids]
    np.add.at(biases, np.searchsorted(places, biased), np.array(values, np.float32))
    biases[np.searchsorted(places, forbidden)] = -np.inf
    at = np.searchsorted(places, seen)
    factors[at] = params.repetition_penalty
    penalties[at] = np.where(counts > 0, params.frequency_penalty * counts + params.presence_penalty, 0.0)
    return Changes(places, biases, factors, penalties)


def _seen(sequence: Sequence, ids: range) -> tuple[np.ndarray, np.ndarray]:
    """Places of tokens with a penalty, and how often they are in the output."""
    params = sequence.request.sampling
    is_repetition = params.repetition_penalty != 1.0
    if not (is_repetition or params.presence_penalty or params.frequency_penalty):
        return _NONE, _NONE
    if sequence.seen is None:
        sequence.seen = SeenTokens(sequence.num_prompt)
    sequence.seen.follow(sequence.token_ids)
    return sequence.seen.inside(ids, only_output=not is_repetition)


def _inside(token_ids: tuple[int, ...] | list[int], ids: range) -> np.ndarray:
    """Places among some ids of those tokens that are there."""
    local = np.asarray(token_ids, np.int64) - ids.start
    return local[(local >= 0) & (local < len(ids))]
