"""Weights for a rank that gets another place: what it holds itself, what others hold, and the store for the rest."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import to_float32
from hpcinfer.kernels.protocol import Kernels, Weight
from hpcinfer.model.shard import ShardPlan, kv_heads
from hpcinfer.model.weights_of import StageWeights, WeightSource

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Holder(Protocol):
    """Who holds units of weights besides the store."""

    def held(self, name: str) -> range:
        """Units of a weight that may be asked for; none of other parameters."""

    def fetch(self, name: str, units: range) -> Weight | None:
        """Give units that are held; None if that fails: then the store is asked."""


class HeldWeights:
    """What a rank holds prepared, as its last place wanted it. Not collective."""

    def __init__(self, config: ModelConfig, kernels: Kernels, plan: ShardPlan, weights: StageWeights) -> None:
        self._config, self._kernels, self._plan, self._weights = config, kernels, plan, weights

    def held(self, name: str) -> range:
        """Units of a weight that this rank holds."""
        plan, tied = self._plan, self._config.tie_word_embeddings
        if name == "embed_tokens.weight":
            return plan.run if plan.is_first or (plan.is_last and tied) else range(0)
        if name == "lm_head.weight":
            return plan.run if plan.is_last else range(0)
        layer, parameter = _parts(name)
        if layer not in plan.layers:
            return range(0)
        return kv_heads(self._config, plan) if parameter in ("k_proj", "v_proj") else plan.run

    def fetch(self, name: str, units: range) -> Weight | None:
        """Give units that this rank holds."""
        first = self.held(name).start
        local = range(units.start - first, units.stop - first)
        if name in ("embed_tokens.weight", "lm_head.weight"):
            return self._outer(name, local)
        layer, parameter = _parts(name)
        weights = self._weights.layers[layer - self._plan.layers.start]
        prepared = weights.attention if parameter in _ATTENTION else weights.mlp
        return self._kernels.give_back(prepared, parameter, local)

    def _outer(self, name: str, local: range) -> Weight | None:
        """A vocabulary weight: a tied one is whole in the table of the first stage, or in the head of the last."""
        if name == "embed_tokens.weight" and self._weights.embed is not None:
            return self._kernels.give_back(self._weights.embed, "embed_tokens", local)
        return self._kernels.give_back(self._weights.head, "lm_head", local)


class Refill:
    """A source of weights that asks holders before the store."""

    def __init__(self, store: WeightSource, holders: list[Holder]) -> None:
        self.config, self.grains = store.config, store.grains
        self._store, self._holders = store, holders
        self.bytes_from_memory = 0

    def read(self, name: str, units: range | None = None) -> tuple[np.ndarray, str]:
        """Values [units, ...] as stored, and their dtype."""
        return self._store.read(name, units)

    def read_weight(self, name: str, units: range | None = None) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Values, dtype, and the scales of a quantised weight; unquantised ones perhaps as float32."""
        if units is None:
            return self._store.read_weight(name)
        parts = [part for run in self._runs(name, units) for part in self._read(name, run)]
        if len(parts) == 1:
            return parts[0]
        if parts[0].scales is None:
            return Weight(np.concatenate([to_float32(part.values, part.dtype) for part in parts]), "float32")
        scales = np.concatenate([part.scales for part in parts if part.scales is not None])
        return Weight(np.concatenate([part.values for part in parts]), parts[0].dtype, scales)

    def _runs(self, name: str, units: range) -> list[_Run]:
        """Cut units into runs of one holder each; the first that has a unit counts."""
        runs: list[_Run] = []
        for unit in units:
            holder = next((each for each in self._holders if unit in each.held(name)), None)
            if runs and runs[-1].holder is holder:
                runs[-1] = runs[-1]._replace(units=range(runs[-1].units.start, unit + 1))
            else:
                runs.append(_Run(holder, range(unit, unit + 1)))
        return runs or [_Run(None, units)]

    def _read(self, name: str, run: _Run) -> list[Weight]:
        found = run.holder.fetch(name, run.units) if run.holder is not None else None
        if found is None:
            return [Weight(*self._store.read_weight(name, run.units))]
        self.bytes_from_memory += found.values.nbytes
        return [found]


class _Run(NamedTuple):
    """Units that come from one holder; from the store if it is None."""

    holder: Holder | None
    units: range


def _parts(name: str) -> tuple[int, str]:
    """Layer and parameter of a weight's name, as layers.3.q_proj.weight."""
    _, layer, parameter, _ = name.split(".")
    return int(layer), parameter
