"""Weights for a rank that gets another place: what it holds itself, what others hold, and the store for the rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, Protocol

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import to_float32
from hpcinfer.kernels.protocol import Kernels, Weight
from hpcinfer.model.shard import ShardPlan, kv_heads
from hpcinfer.model.weights_of import StageWeights, WeightSource

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_UNREAD = 1e18  # bytes per second, of a store that has not been read


class Holder(Protocol):
    """Who holds units of weights besides the store."""

    source: str  # its kind, for reports

    @property
    def bytes_per_s(self) -> float:
        """What it gives, as far as is known."""

    def held(self, name: str) -> range:
        """Units of a weight that may be asked for; none of other parameters."""

    def fetch(self, name: str, units: range) -> Weight | None:
        """Give units that are held; None if that fails: then the store is asked."""


@dataclass
class Rate:
    """Bytes per second of a source, as measured."""

    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Count bytes that have come in that time."""
        self.num_bytes += num_bytes
        self.seconds += seconds

    def per_s(self, unknown: float) -> float:
        """The rate; `unknown` while there is none."""
        return self.num_bytes / self.seconds if self.num_bytes and self.seconds else unknown


def held_units(config: ModelConfig, plan: ShardPlan, name: str) -> range:
    """Units of a weight that a rank with this plan holds prepared."""
    if name == "embed_tokens.weight":
        return plan.run if plan.is_first or (plan.is_last and config.tie_word_embeddings) else range(0)
    if name == "lm_head.weight":
        return plan.run if plan.is_last else range(0)
    layer, parameter = _parts(name)
    if layer not in plan.layers:
        return range(0)
    return kv_heads(config, plan) if parameter in ("k_proj", "v_proj") else plan.run


class HeldWeights:
    """What a rank holds prepared, as its last place wanted it. Not collective."""

    source, bytes_per_s = "own", inf

    def __init__(self, config: ModelConfig, kernels: Kernels, plan: ShardPlan, weights: StageWeights) -> None:
        self.config, self._kernels, self.plan, self._weights = config, kernels, plan, weights

    def held(self, name: str) -> range:
        """Units of a weight that this rank holds."""
        return held_units(self.config, self.plan, name)

    def fetch(self, name: str, units: range, outs: range | None = None) -> Weight | None:
        """Give units that this rank holds, or some outputs of them."""
        first = self.held(name).start
        local = range(units.start - first, units.stop - first)
        if name in ("embed_tokens.weight", "lm_head.weight"):
            return self._outer(name, local, outs)
        layer, parameter = _parts(name)
        weights = self._weights.layers[layer - self.plan.layers.start]
        prepared = weights.attention if parameter in _ATTENTION else weights.mlp
        return self._kernels.give_back(prepared, parameter, local, outs)

    def _outer(self, name: str, local: range, outs: range | None) -> Weight | None:
        """A vocabulary weight: a tied one is whole in the table of the first stage, or in the head of the last."""
        if name == "embed_tokens.weight" and self._weights.embed is not None:
            return self._kernels.give_back(self._weights.embed, "embed_tokens", local, outs)
        return self._kernels.give_back(self._weights.head, "lm_head", local, outs)


class Refill:
    """A source of weights: each unit comes from whoever gives the most bytes per second, of holders and the store.

    What the store gives is measured while it is read; before that it counts as the fastest but for own memory.
    """

    def __init__(self, store: WeightSource, holders: Sequence[Holder]) -> None:
        self.config, self.grains = store.config, store.grains
        self._store, self._holders = store, holders
        self._rate = Rate()  # of the store
        self.num_bytes: Counter[str] = Counter(own=0, sister=0, store=0)  # that have come, by source

    def forget(self) -> None:
        """Let go of all holders: what is read from now on comes from the store. Not collective."""
        self._holders = ()

    def read(self, name: str, units: range | None = None) -> tuple[np.ndarray, str]:
        """Values [units, ...] as stored, and their dtype."""
        values, dtype = self._store.read(name, units)
        self.num_bytes["store"] += values.nbytes
        return values, dtype

    def read_weight(self, name: str, units: range | None = None) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Values, dtype, and the scales of a quantised weight; unquantised ones perhaps as float32."""
        if units is None:
            return self._read_store(name, None)
        parts = [self._read(name, run) for run in self._runs(name, units)]
        if len(parts) == 1:
            return parts[0]
        if parts[0].scales is None:
            return Weight(np.concatenate([to_float32(part.values, part.dtype) for part in parts]), "float32")
        scales = np.concatenate([part.scales for part in parts if part.scales is not None])
        return Weight(np.concatenate([part.values for part in parts]), parts[0].dtype, scales)

    def _runs(self, name: str, units: range) -> list[_Run]:
        """Cut units into runs of one source each."""
        held = {each: each.held(name) for each in self._holders}
        faster = [each for each in self._holders if each.bytes_per_s > self._rate.per_s(_UNREAD)]
        ranked = sorted(faster, key=lambda holder: -holder.bytes_per_s)
        runs: list[_Run] = []
        for unit in units:
            holder = next((each for each in ranked if unit in held[each]), None)
            if runs and runs[-1].holder is holder:
                runs[-1] = runs[-1]._replace(units=range(runs[-1].units.start, unit + 1))
            else:
                runs.append(_Run(holder, range(unit, unit + 1)))
        return runs or [_Run(None, units)]

    def _read(self, name: str, run: _Run) -> Weight:
        found = run.holder.fetch(name, run.units) if run.holder is not None else None
        if run.holder is None or found is None:
            return self._read_store(name, run.units)
        self.num_bytes[run.holder.source] += _num_bytes(found)
        return found

    def _read_store(self, name: str, units: range | None) -> Weight:
        start = time.monotonic()
        found = Weight(*self._store.read_weight(name, units))
        self._rate.add(_num_bytes(found), time.monotonic() - start)
        self.num_bytes["store"] += _num_bytes(found)
        return found


class _Run(NamedTuple):
    """Units that come from one holder; from the store if it is None."""

    holder: Holder | None
    units: range


def _num_bytes(weight: Weight) -> int:
    return int(weight.values.nbytes + (0 if weight.scales is None else weight.scales.nbytes))


def _parts(name: str) -> tuple[int, str]:
    """Layer and parameter of a weight's name, as layers.3.q_proj.weight."""
    _, layer, parameter, _ = name.split(".")
    return int(layer), parameter
