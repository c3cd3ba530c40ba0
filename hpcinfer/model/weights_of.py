"""The weights of one rank, read from a store and prepared for the kernels."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import round_to, to_float32
from hpcinfer.kernels.protocol import Array, AttentionShape, AttentionWeights, Kernels, Linear, MlpWeights, Weight
from hpcinfer.model.shard import ShardPlan, head_layout, kv_heads


class WeightSource(Protocol):
    """What a store gives: units of parameters by name (see hpcinfer.weights.schema)."""

    config: ModelConfig
    grains: int

    def read(self, name: str, units: range | None = None) -> tuple[np.ndarray, str]:
        """Values [units, ...] as stored, and their dtype; all units if None."""

    def read_weight(self, name: str, units: range | None = None) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Values, dtype, and the scales of a quantised weight."""


class LayerWeights(NamedTuple):
    """One decoder layer."""

    attention: Any  # of Kernels.prepare_attention
    o_bias: Array | None  # added once to the finished sum
    mlp: Any  # of Kernels.prepare_mlp
    down_bias: Array | None


@dataclass(frozen=True)
class StageWeights:
    """What one rank holds of a model."""

    embed: Any | None  # of Kernels.prepare_table; first stage
    layers: tuple[LayerWeights, ...]
    head: Any | None  # of Kernels.prepare_head; last stage


class LoadOptions(NamedTuple):
    """How weights are prepared."""

    dtype: str = "auto"  # precision that unquantised weights are rounded to; "auto" and "float32" keep the stored one
    max_len: int = 1  # positions that may occur


def load_stage(store: WeightSource, kernels: Kernels, plan: ShardPlan, options: LoadOptions) -> StageWeights:
    """Read the weights of one rank, file by file.

    Not collective.

    Args:
        store: an open store.
        kernels: which prepare the weights.
        plan: what this rank holds.
        options: how.

    Raises:
        StoreError: a damaged store.
    """
    config, reader = store.config, _Reader(store, kernels, plan, options.dtype)
    table = reader.weight("embed_tokens", plan.run) if plan.is_first or _is_tied_head(config, plan) else None
    embed = kernels.prepare_table(table) if plan.is_first and table is not None else None
    head = None
    if plan.is_last:
        weight = table if config.tie_word_embeddings and table is not None else reader.weight("lm_head", plan.run)
        head = kernels.prepare_head(reader.whole("norm"), weight, config.rms_norm_eps)
    rope = kernels.rope_table(options.max_len, config.head_size, config.rope_theta, config.rope_scaling)
    layers = tuple(_load_layer(config, reader, layer, rope) for layer in plan.layers)
    return StageWeights(embed, layers, head)


def _is_tied_head(config: ModelConfig, plan: ShardPlan) -> bool:
    return plan.is_last and config.tie_word_embeddings


def _load_layer(config: ModelConfig, reader: "_Reader", layer: int, rope: Array) -> LayerWeights:
    name = f"layers.{layer}"
    return LayerWeights(
        attention=_load_attention(config, reader, layer, rope),
        o_bias=reader.vector(f"{name}.o_proj", "bias") if config.o_bias else None,
        mlp=_load_mlp(config, reader, name),
        down_bias=reader.vector(f"{name}.down_proj", "bias") if config.mlp_bias else None,
    )


def _load_attention(config: ModelConfig, reader: "_Reader", layer: int, rope: Array) -> Any:
    name, run, heads = f"layers.{layer}", reader.plan.run, kv_heads(config, reader.plan)
    weights = AttentionWeights(
        norm=reader.whole(f"{name}.input_layernorm"),
        q=reader.linear(f"{name}.q_proj", run, has_bias=config.qkv_bias),
        k=reader.linear(f"{name}.k_proj", heads, has_bias=config.qkv_bias),
        v=reader.linear(f"{name}.v_proj", heads, has_bias=config.qkv_bias),
        o=reader.weight(f"{name}.o_proj", run),
        q_norm=reader.whole(f"{name}.q_norm") if config.qk_norm else None,
        k_norm=reader.whole(f"{name}.k_norm") if config.qk_norm else None,
    )
    window = config.windows[layer] if config.windows else 0
    shape = AttentionShape(head_layout(config, reader.plan), config.rms_norm_eps, rope, window)
    return reader.kernels.prepare_attention(weights, shape)


def _load_mlp(config: ModelConfig, reader: "_Reader", name: str) -> Any:
    run = reader.plan.run
    weights = MlpWeights(
        norm=reader.whole(f"{name}.post_attention_layernorm"),
        gate=reader.linear(f"{name}.gate_proj", run, has_bias=config.mlp_bias),
        up=reader.linear(f"{name}.up_proj", run, has_bias=config.mlp_bias),
        down=reader.weight(f"{name}.down_proj", run),
    )
    return reader.kernels.prepare_mlp(weights, config.rms_norm_eps)


@dataclass(frozen=True)
class _Reader:
    """Reads parameters in the precision asked for."""

    store: WeightSource
    kernels: Kernels
    plan: ShardPlan
    dtype: str

    def linear(self, name: str, units: range, *, has_bias: bool) -> Linear:
        """A weight split over units, with the bias of the same units."""
        bias = self._float32(f"{name}.bias", units) if has_bias else None
        return Linear(self.weight(name, units), bias)

    def weight(self, name: str, units: range) -> Weight:
        """A weight split over units; a quantised one stays as stored."""
        values, stored, scales = self.store.read_weight(f"{name}.weight", units)
        if scales is not None or self.dtype in ("auto", "float32", stored):
            return Weight(values, stored, scales)
        return Weight(round_to(to_float32(values, stored), self.dtype), self.dtype)

    def vector(self, name: str, kind: str = "weight") -> Array:
        """A vector that is not split, prepared."""
        return self.kernels.vector(self.whole(name, kind))

    def whole(self, name: str, kind: str = "weight") -> np.ndarray:
        """A vector that is not split, as float32."""
        return self._float32(f"{name}.{kind}", None)[0]

    def _float32(self, name: str, units: range | None) -> np.ndarray:
        values, stored = self.store.read(name, units)
        exact = to_float32(values, stored)
        if self.dtype in ("auto", "float32", stored):
            return exact
        return to_float32(round_to(exact, self.dtype), self.dtype)
