"""Models of random weights that no file holds: a `WeightSource` that makes up units when they are asked for."""

import zlib
from dataclasses import asdict
from functools import cached_property

import numpy as np
from operations import linear_size
from random_model import Shape

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import SCALES, STORAGE, round_to
from hpcinfer.errors import ConfigError
from hpcinfer.weights.schema import quantised_type, scale_name, stored_specs

_MOST_GRAINS = 8
_STDDEV = 0.02  # of all weights but the norms
_MOST_VALUES = 1 << 26  # of a pool: more than a layer's weight has, so that only vocabulary tables repeat values
_STARTS = 4099  # places of a pool at which weights begin
PRECISIONS = ("bf16", "int8", "int4", "fp8")


def model_config(shape: Shape, max_len: int) -> ModelConfig:
    """Describe a Llama of a shape."""
    return ModelConfig(
        architecture="LlamaForCausalLM", hidden_size=shape.hidden_size, num_layers=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads,
        head_size=shape.hidden_size // shape.num_attention_heads, intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size, max_position_embeddings=max_len, rms_norm_eps=1e-5, rope_theta=500000.0,
    )  # fmt: skip


class RandomSource:
    """Random weights of a shape, in one precision.

    Args:
        shape: of the model.
        precision: of the weights, one of PRECISIONS.
        max_len: positions that may occur.

    Raises:
        ConfigError: a precision that stores do not have.
    """

    def __init__(self, shape: Shape, precision: str, max_len: int) -> None:
        self.config = model_config(shape, max_len)
        self.grains = min(_MOST_GRAINS, shape.num_attention_heads)
        self._shape, self._quantisation = shape, "none" if precision == "bf16" else precision
        specs = stored_specs(self.config, self.grains, self._quantisation)
        if any(self._dtype(spec.name) not in STORAGE for spec in specs):
            raise ConfigError(f"weights in {precision}", expected=f"one of {', '.join(STORAGE)}")
        self._specs = {spec.name: spec for spec in specs}
        self._pool_size = _STARTS + min(_MOST_VALUES, max(int(np.prod(spec.shape)) for spec in specs))
        self._pools: dict[str, np.ndarray] = {}

    def read(self, name: str, units: range | None = None) -> tuple[np.ndarray, str]:
        """Norms: ones."""
        shape = self._shape_of(name, units)
        return round_to(np.ones(shape, np.float32), "bfloat16"), "bfloat16"

    def read_weight(self, name: str, units: range | None = None) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Values, dtype, and the scales of a quantised weight."""
        dtype, shape = self._dtype(name), self._shape_of(name, units)
        start = (zlib.crc32(name.encode()) + (units.start if units else 0)) % _STARTS
        values = self._values(dtype, start, shape)
        if dtype not in SCALES:
            return values, dtype, None
        scales = np.full(self._shape_of(scale_name(name), units), _scale(dtype), np.float32)
        return values, dtype, round_to(scales, SCALES[dtype])

    @cached_property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding, of which it takes a few rows."""
        names = (name for name in self._specs if not name.startswith("embed_tokens"))
        return sum(int(np.prod(self._specs[name].shape)) * STORAGE[self._dtype(name)].itemsize for name in names)

    def operations(self, tokens: int, outputs: int) -> int:
        """Operations of linear layers for so many tokens, and of the head for so many outputs."""
        size = linear_size(asdict(self._shape))
        return 2 * (tokens * size.weights + outputs * size.head_weights)

    def attention_operations(self, length: int) -> int:
        """Operations of causal attention over a prompt: half a square for each query head, twice."""
        config = self.config
        return 2 * config.num_layers * config.num_heads * config.head_size * length * (length + 1)

    def _dtype(self, name: str) -> str:
        base = name.removesuffix(scale_name(""))
        kind = quantised_type(base, self._quantisation)
        if base != name:
            return SCALES[kind]
        return kind or "bfloat16"

    def _shape_of(self, name: str, units: range | None) -> tuple[int, ...]:
        whole = self._specs[name].shape
        return whole if units is None else (len(units), *whole[1:])

    def _values(self, dtype: str, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """A view of the pool, or copies of it one after another where it is too small."""
        if dtype not in self._pools:
            self._pools[dtype] = _random_values(dtype, self._pool_size)
        pool, size = self._pools[dtype][start:], int(np.prod(shape))
        return pool[:size].reshape(shape) if size <= len(pool) else np.resize(pool, shape)


def _random_values(dtype: str, size: int) -> np.ndarray:
    random = np.random.default_rng(0)
    if dtype == "bfloat16":
        return round_to(random.standard_normal(size, np.float32) * np.float32(_STDDEV), dtype)
    if dtype == "int8":
        return random.integers(-127, 128, size, np.int8)
    codes = random.integers(0, 256, size, np.uint8)
    return codes if dtype == "int4" else codes & np.uint8(0xBF)  # of fp8: finite, and below 2


def _scale(dtype: str) -> float:
    """The scale with which random codes have the standard deviation of a weight."""
    return _STDDEV / {"int8": 73.3, "int4": 4.6}.get(dtype, 0.6)
