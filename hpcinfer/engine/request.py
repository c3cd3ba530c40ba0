"""A request: what one row asks for, immutable, and its bytes in a step record."""

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcinfer.config import SamplingParams

_HEADER = struct.Struct("<qii")  # row, prompt tokens, bytes of JSON
_DEFAULTS = vars(SamplingParams())


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it."""

    row: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams

    def to_bytes(self) -> bytes:
        """Encode; sampling as JSON of what differs from the defaults (floats survive exactly)."""
        values = vars(self.sampling).items()
        options = json.dumps({name: value for name, value in values if value != _DEFAULTS[name]}).encode()
        ids = np.asarray(self.prompt_ids, dtype=np.int32).tobytes()
        return _HEADER.pack(self.row, len(self.prompt_ids), len(options)) + ids + options

    @staticmethod
    def from_bytes(data: bytes) -> "Request":
        """Decode what `to_bytes` made."""
        row, num_ids, num_options = _HEADER.unpack_from(data)
        ids_end = _HEADER.size + 4 * num_ids
        ids = np.frombuffer(data, np.int32, num_ids, _HEADER.size)
        options = json.loads(data[ids_end : ids_end + num_options])
        return Request(row, tuple(ids.tolist()), SamplingParams(**{k: _tuples(v) for k, v in options.items()}))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
