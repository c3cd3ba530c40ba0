"""A request: what one row asks for, immutable, and its bytes in a step record."""

import json
import struct
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from hpcinfer.config import SamplingParams

_HEADER = struct.Struct("<qiiii")  # row, generation, prompt tokens, resumed choices, bytes of JSON
_DEFAULTS = vars(SamplingParams())


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it."""

    row: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    resumed: tuple[tuple[int, ...], ...] = ()  # output tokens that each choice already has; () is none at all
    generation: int = 0  # of the claim that the row belongs to: a new leader needs it, the engine does not

    def to_bytes(self) -> bytes:
        """Encode; sampling as JSON of what differs from the defaults (floats survive exactly)."""
        values = vars(self.sampling).items()
        options = json.dumps({name: value for name, value in values if value != _DEFAULTS[name]}).encode()
        header = _HEADER.pack(self.row, self.generation, len(self.prompt_ids), len(self.resumed), len(options))
        lengths = [len(ids) for ids in self.resumed]
        ids = np.fromiter(chain(lengths, self.prompt_ids, *self.resumed), np.int32)
        return header + ids.tobytes() + options

    @staticmethod
    def from_bytes(data: bytes) -> "Request":
        """Decode what `to_bytes` made."""
        row, generation, num_prompt, num_resumed, num_options = _HEADER.unpack_from(data)
        lengths = np.frombuffer(data, np.int32, num_resumed, _HEADER.size).tolist()
        start, num_ids = _HEADER.size + 4 * num_resumed, num_prompt + sum(lengths)
        ids = iter(np.frombuffer(data, np.int32, num_ids, start).tolist())
        prompt, *resumed = (tuple(islice(ids, length)) for length in (num_prompt, *lengths))
        options = json.loads(data[start + 4 * num_ids :][:num_options])
        sampling = SamplingParams(**{name: _tuples(value) for name, value in options.items()})
        return Request(row, prompt, sampling, tuple(resumed), generation)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
