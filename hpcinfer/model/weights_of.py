"""The weights of one rank, read from a store and prepared for the kernels."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import round_to, to_float32
from hpcinfer.kernels.protocol import Array, Kernels
from hpcinfer.model.shard import ShardPlan, kv_heads


class WeightSource(Protocol):
    """What a store gives: units of parameters by name (see hpcinfer.weights.schema)."""

    config: ModelConfig
    grains: int

    def read(self, name: str, units: range | None = None) -> tuple[np.ndarray, str]:
        """Values [units, ...] as stored, and their dtype; all units if None."""


class Linear(NamedTuple):
    """A weight, and its bias if it has one."""

    weight: Any  # of Kernels.linear
    bias: Array | None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Array
    q: Linear
    k: Linear
    v: Linear
    q_norm: Array | None
    k_norm: Array | None
    o: Linear
    post_norm: Array
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class StageWeights:
    """What one rank holds of a model."""

    embed: Any | None  # of Kernels.linear; first stage
    layers: tuple[LayerWeights, ...]
    norm: Array | None  # last stage
    head: Any | None  # of Kernels.linear; last stage


def load_stage(store: WeightSource, kernels: Kernels, plan: ShardPlan, dtype: str = "auto") -> StageWeights:
    """Read the weights of one rank, file by file.

    Not collective.

    Args:
        store: an open store.
        kernels: which prepare the weights.
        plan: what this rank holds.
        dtype: precision that weights are rounded to; "auto" keeps the stored one, and so does "float32".

    Raises:
        StoreError: a damaged store.
    """
    config, reader = store.config, _Reader(store, kernels, plan, dtype)
    is_tied = config.tie_word_embeddings
    embed = reader.weight("embed_tokens", plan.run) if plan.is_first or (plan.is_last and is_tied) else None
    norm = reader.whole("norm") if plan.is_last else None
    head = embed if is_tied else reader.weight("lm_head", plan.run) if plan.is_last else None
    layers = tuple(_load_layer(config, reader, f"layers.{layer}") for layer in plan.layers)
    return StageWeights(embed, layers, norm, head)


def _load_layer(config: ModelConfig, reader: "_Reader", name: str) -> LayerWeights:
    run, heads = reader.plan.run, kv_heads(config, reader.plan)
    qkv, mlp = config.qkv_bias, config.mlp_bias
    return LayerWeights(
        input_norm=reader.whole(f"{name}.input_layernorm"),
        q=reader.linear(f"{name}.q_proj", run, has_bias=qkv),
        k=reader.linear(f"{name}.k_proj", heads, has_bias=qkv),
        v=reader.linear(f"{name}.v_proj", heads, has_bias=qkv),
        q_norm=reader.whole(f"{name}.q_norm") if config.qk_norm else None,
        k_norm=reader.whole(f"{name}.k_norm") if config.qk_norm else None,
        o=reader.row_parallel(f"{name}.o_proj", has_bias=config.o_bias),
        post_norm=reader.whole(f"{name}.post_attention_layernorm"),
        gate=reader.linear(f"{name}.gate_proj", run, has_bias=mlp),
        up=reader.linear(f"{name}.up_proj", run, has_bias=mlp),
        down=reader.row_parallel(f"{name}.down_proj", has_bias=mlp),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads parameters in the precision asked for."""

    store: WeightSource
    kernels: Kernels
    plan: ShardPlan
    dtype: str

    def linear(self, name: str, units: range, *, has_bias: bool) -> Linear:
        """A weight split over units, with the bias of the same units."""
        bias = self.kernels.vector(*self._read(f"{name}.bias", units)) if has_bias else None
        return Linear(self.weight(name, units), bias)

    def row_parallel(self, name: str, *, has_bias: bool) -> Linear:
        """A weight split over grains, with the whole bias, which is added once to the finished sum."""
        return Linear(self.weight(name, self.plan.run), self.whole(name, "bias") if has_bias else None)

    def weight(self, name: str, units: range) -> Any:
        """A weight split over units."""
        return self.kernels.linear(*self._read(f"{name}.weight", units))

    def whole(self, name: str, kind: str = "weight") -> Array:
        """A vector that is not split."""
        values, dtype = self._read(f"{name}.{kind}", None)
        return self.kernels.vector(values[0], dtype)

    def _read(self, name: str, units: range | None) -> tuple[np.ndarray, str]:
        values, stored = self.store.read(name, units)
        if self.dtype in ("auto", "float32", stored):
            return values, stored
        return round_to(to_float32(values, stored), self.dtype), self.dtype
