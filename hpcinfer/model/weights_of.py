"""The weights of one rank, read from a store and prepared for the kernels."""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpcinfer.comm.waiting import turn_meanwhile
from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import SCALES, round_to, to_float32
from hpcinfer.kernels.protocol import (
    Array,
    AttentionShape,
    AttentionWeights,
    Kernels,
    LayerWeights,
    Linear,
    MlpWeights,
    Weight,
)
from hpcinfer.model.shard import ShardPlan, head_layout, kv_heads


class WeightSource(Protocol):
    """What a store gives: units of parameters by name (see hpcinfer.weights.schema)."""

    config: ModelConfig
    grains: int

    def read(self, name: str, units: range | None = None) -> tuple[np.ndarray, str]:
        """Values [units, ...] as stored, and their dtype; all units if None."""

    def read_weight(self, name: str, units: range | None = None) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Values, dtype, and the scales of a quantised weight."""


class StageWeights(Protocol):
    """What one rank holds of a model."""

    @property
    def embed(self) -> Any | None:
        """Of Kernels.prepare_table; first stage."""

    @property
    def layers(self) -> Sequence[LayerWeights]:
        """Those of the stage."""

    @property
    def head(self) -> Any | None:
        """Of Kernels.prepare_head; last stage."""

    @property
    def bytes_to_come(self) -> int:
        """Memory that will be taken by what is not there yet, about."""


@dataclass(frozen=True)
class LoadedStage:
    """`StageWeights` that are all there."""

    embed: Any | None
    layers: tuple[LayerWeights, ...]
    head: Any | None
    bytes_to_come: int = 0


class LoadOptions(NamedTuple):
    """How weights are prepared."""

    dtype: str = "auto"  # precision that unquantised weights are rounded to; "auto" and "float32" keep the stored one
    max_len: int = 1  # positions that may occur


def load_stage(store: WeightSource, kernels: Kernels, plan: ShardPlan, options: LoadOptions) -> LoadedStage:
    """Read the weights of one rank and prepare them.

    Not collective.

    Args:
        store: an open store.
        kernels: which prepare the weights.
        plan: what this rank holds.
        options: how.

    Raises:
        StoreError: a damaged store.
    """
    parts = []
    for part in load_parts(store, kernels, plan, options):
        parts.append(part)
        turn_meanwhile()
    embed, *layers, head = parts
    return LoadedStage(embed, tuple(layers), head)


def load_parts(
    store: WeightSource, kernels: Kernels, plan: ShardPlan, options: LoadOptions
) -> Generator[Any, None, None]:
    """Read and prepare the weights of one rank in the order in which they are used; a thread reads ahead.

    Not collective. See `load_stage`.

    Yields:
        The embedding, the layers, the head, as in `StageWeights`.
    """
    config, reader = store.config, _Reader(store, plan, options.dtype)
    rope = kernels.rope_table(options.max_len, config.head_size, config.rope_theta, config.rope_scaling)
    halves = [(half, layer) for layer in plan.layers for half in (reader.attention, reader.mlp)]
    reads: list[Callable[[], Any]] = [reader.table, *(partial(half, layer) for half, layer in halves), reader.head]
    with closing(_in_advance(reads)) as found:
        table: Any = next(found)
        yield kernels.prepare_table(table) if plan.is_first else None
        if not config.tie_word_embeddings:
            table = None  # its memory is wanted
        for layer in plan.layers:
            yield _prepare_layer(found, config, kernels, plan, layer, rope)
        head = next(found)
        yield kernels.prepare_head(head.norm, head.table or table, config.rms_norm_eps) if head is not None else None


def _in_advance(reads: Sequence[Callable[[], Any]]) -> Generator[Any, None, None]:
    """What each of them reads, in order; while the caller works with one, a thread reads the next."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(reads[0])
        for read in reads[1:]:
            found = coming.result()
            coming = pool.submit(read)
            yield found
        yield coming.result()


class _Head(NamedTuple):
    """What comes after the layers, as read."""

    norm: np.ndarray
    table: Weight | None  # of its own; None if it is the embedding's


class _Half(NamedTuple):
    """Half a layer, as read, and the bias of its finished sum."""

    weights: Any  # AttentionWeights or MlpWeights
    bias: np.ndarray | None


def _prepare_layer(
    halves: Iterator[_Half], config: ModelConfig, kernels: Kernels, plan: ShardPlan, layer: int, rope: Array
) -> LayerWeights:
    window = config.windows[layer] if config.windows else 0
    shape = AttentionShape(head_layout(config, plan), config.rms_norm_eps, rope, window)
    weights, bias = next(halves)
    attention, o_bias = kernels.prepare_attention(weights, shape), _vector(kernels, bias)
    weights, bias = next(halves)
    return LayerWeights(attention, o_bias, kernels.prepare_mlp(weights, config.rms_norm_eps), _vector(kernels, bias))


def _vector(kernels: Kernels, values: np.ndarray | None) -> Array | None:
    return None if values is None else kernels.vector(values)


@dataclass(frozen=True)
class _Reader:
    """Reads parameters in the precision asked for."""

    store: WeightSource
    plan: ShardPlan
    dtype: str

    def table(self) -> Weight | None:
        """The embedding, which may be the head of the last stage too."""
        is_needed = self.plan.is_first or (self.plan.is_last and self.store.config.tie_word_embeddings)
        return self.weight("embed_tokens", self.plan.run) if is_needed else None

    def head(self) -> _Head | None:
        """What the last stage needs besides layers."""
        if not self.plan.is_last:
            return None
        is_tied = self.store.config.tie_word_embeddings
        return _Head(self.whole("norm"), None if is_tied else self.weight("lm_head", self.plan.run))

    def attention(self, layer: int) -> _Half:
        """The attention half of a layer."""
        config, name, run = self.store.config, f"layers.{layer}", self.plan.run
        heads = kv_heads(config, self.plan)
        weights = AttentionWeights(
            norm=self.whole(f"{name}.input_layernorm"),
            q=self.linear(f"{name}.q_proj", run, has_bias=config.qkv_bias),
            k=self.linear(f"{name}.k_proj", heads, has_bias=config.qkv_bias),
            v=self.linear(f"{name}.v_proj", heads, has_bias=config.qkv_bias),
            o=self.weight(f"{name}.o_proj", run),
            q_norm=self.whole(f"{name}.q_norm") if config.qk_norm else None,
            k_norm=self.whole(f"{name}.k_norm") if config.qk_norm else None,
        )
        return _Half(weights, self.whole(f"{name}.o_proj", "bias") if config.o_bias else None)

    def mlp(self, layer: int) -> _Half:
        """The MLP half of a layer."""
        config, name, run = self.store.config, f"layers.{layer}", self.plan.run
        weights = MlpWeights(
            norm=self.whole(f"{name}.post_attention_layernorm"),
            gate=self.linear(f"{name}.gate_proj", run, has_bias=config.mlp_bias),
            up=self.linear(f"{name}.up_proj", run, has_bias=config.mlp_bias),
            down=self.weight(f"{name}.down_proj", run),
        )
        return _Half(weights, self.whole(f"{name}.down_proj", "bias") if config.mlp_bias else None)

    def linear(self, name: str, units: range, *, has_bias: bool) -> Linear:
        """A weight split over units, with the bias of the same units."""
        bias = self._float32(f"{name}.bias", units) if has_bias else None
        return Linear(self.weight(name, units), bias)

    def weight(self, name: str, units: range) -> Weight:
        """A weight split over units; a quantised one stays as stored."""
        values, stored, scales = self.store.read_weight(f"{name}.weight", units)
        if is_read_as_stored(self.dtype, stored):
            return Weight(values, stored, scales)
        return Weight(round_to(to_float32(values, stored), self.dtype), self.dtype)

    def whole(self, name: str, kind: str = "weight") -> np.ndarray:
        """A vector that is not split, as float32."""
        return self._float32(f"{name}.{kind}", None)[0]

    def _float32(self, name: str, units: range | None) -> np.ndarray:
        values, stored = self.store.read(name, units)
        exact = to_float32(values, stored)
        if is_read_as_stored(self.dtype, stored):
            return exact
        return to_float32(round_to(exact, self.dtype), self.dtype)


def is_read_as_stored(dtype: str, stored: str) -> bool:
    """Whether a weight of a stored type is not rounded: no narrower one was asked for. Quantised ones never are."""
    return stored in SCALES or dtype in ("auto", "float32", stored)
