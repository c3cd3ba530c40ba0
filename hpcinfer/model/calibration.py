"""Running a model on a text for the sake of the inputs of its weights, layer by layer, out of its checkpoint.

A plain float32 decoder in numpy, whose inner values can be looked at; it shares nothing with the kernels that serve.
The windows of the text are shared by the ranks, and what they give is added up in the windows' order, so that the sums
do not depend on the number of ranks.

Shape letters: T tokens of a window, D hidden size, N query heads, K KV heads, H head size, F MLP width, G grains.
"""

import hashlib
from functools import partial
from typing import Any

import numpy as np

from hpcinfer.agree import on_all
from hpcinfer.comm.protocol import Collectives
from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import to_float32
from hpcinfer.errors import ModelError
from hpcinfer.kernels.rope import rope_table
from hpcinfer.weights.schema import MLP, QUERY_HEADS, layer_specs, source_name, unit_ranges
from hpcinfer.weights.source import Source
from hpcinfer.weights.writer import Moments

WINDOW, MAX_WINDOWS = 2048, 64  # tokens; more text than this adds little
_USERS = {
    "attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "heads": ("o_proj.weight",),
    "mlp": ("gate_proj.weight", "up_proj.weight"),
    "activations": ("down_proj.weight",),
}  # which weights read which values
_TAG = 1
Inputs = dict[str, np.ndarray]  # by key of _USERS: what these weights read, float32 [T, inputs]


class Calibration:
    """Second moments of the inputs of each layer's weights (`hpcinfer.weights.conversion.Calibrator`)."""

    def __init__(self, source: Source, grains: int, windows: list[tuple[int, ...]], group: Collectives) -> None:
        """Embed this rank's windows, of which there is at least one in all. Not collective."""
        self._source, self._group, self._num_windows = source, group, len(windows)
        ids = b"".join(np.asarray(window, "<i4").tobytes() for window in windows)
        self.facts: dict[str, Any] = {
            "windows": len(windows),
            "tokens": sum(map(len, windows)),
            "sha256": hashlib.sha256(ids).hexdigest(),  # of all token ids, as 32-bit integers
        }
        config, self._grains = source.config, grains
        table, scaling = _read(source, "embed_tokens.weight"), config.rope_scaling
        self._hidden = [table[list(window)] for window in windows[group.rank :: group.size]]
        self._rope = rope_table(max(map(len, windows)), config.head_size, config.rope_theta, scaling)

    def moments(self, layer: int, owner: int) -> Moments:
        """Run all windows through one layer; the second moments of its weights' inputs on the owner, else nothing.

        Collective over the group; layers come in order.

        Returns:
            By dataset, float64 [1 or G, inputs, inputs], padded as the store's units are.

        Raises:
            ModelError: inputs that are not finite.
        """
        config, group = self._source.config, self._group
        window = config.windows[layer] if config.windows else 0
        weights = on_all(group, lambda: _read_layer(self._source, layer, self._grains))
        decoder = _Layer(config, weights, self._rope, window)
        totals = {key: np.zeros(shape) for key, shape in self._shapes().items()} if group.rank == owner else {}
        for first in range(0, self._num_windows, group.size):
            mine = on_all(group, partial(self._run, decoder, first // group.size))
            for peer in range(min(group.size, self._num_windows - first)):
                self._add(totals, mine, peer, owner)
        found = {name: total for key, total in totals.items() for name in _USERS[key]}
        on_all(group, partial(_check_finite, layer, found))
        return found

    def _run(self, decoder: "_Layer", index: int) -> dict[str, np.ndarray]:
        """Moments of one window of this rank, whose hidden state moves on by a layer."""
        if index >= len(self._hidden):
            return {}
        self._hidden[index], inputs = decoder.run(self._hidden[index])
        return {key: self._moments_of(key, x) for key, x in inputs.items()}

    def _add(self, totals: dict[str, np.ndarray], mine: dict[str, np.ndarray], peer: int, owner: int) -> None:
        """Bring one rank's moments to the owner."""
        rank = self._group.rank
        if rank == owner:
            for key, total in totals.items():
                part = mine[key] if peer == rank else np.empty_like(total)
                if peer != rank:
                    self._group.receive(part, peer, _TAG)
                total += part
        elif rank == peer:
            for key in _USERS:
                self._group.send(mine[key], owner, _TAG).wait()

    def _units(self, key: str) -> list[range]:
        """Which inputs each unit reads, where row-parallel weights are cut; else all."""
        config = self._source.config
        if key in ("heads", "activations"):
            return unit_ranges(config, QUERY_HEADS if key == "heads" else MLP, self._grains)
        return [range(config.hidden_size)]

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        specs = {spec.name: spec.shape for spec in layer_specs(self._source.config, 0, self._grains)}
        inputs = {key: specs[f"layers.0.{names[0]}"][-1] for key, names in _USERS.items()}
        return {key: (len(self._units(key)), size, size) for key, size in inputs.items()}

    def _moments_of(self, key: str, x: np.ndarray) -> np.ndarray:
        result = np.zeros(self._shapes()[key])
        for unit, held in enumerate(self._units(key)):
            part = x[:, held.start : held.stop].astype(np.float64)
            result[unit, : len(held), : len(held)] = part.T @ part
        return result


class _Layer:
    """One decoder layer in float32, as the checkpoint has it."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray], rope: np.ndarray, window: int) -> None:
        self._config, self._weights, self._rope, self._window = config, weights, rope, window

    def run(self, x: np.ndarray) -> tuple[np.ndarray, Inputs]:
        """Hidden [T, D] after the layer, and what its weights have read."""
        attention = self._norm(x, "input_layernorm")
        heads = self._attend(*(self._linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")))
        x = x + self._linear(heads, "o_proj")
        mlp = self._norm(x, "post_attention_layernorm")
        gate, up = self._linear(mlp, "gate_proj"), self._linear(mlp, "up_proj")
        with np.errstate(over="ignore"):  # exp of a large -gate: the quotient is 0, as it should be
            activations = gate / (1 + np.exp(-gate)) * up
        x = x + self._linear(activations, "down_proj")
        return x, {"attention": attention, "heads": heads, "mlp": mlp, "activations": activations}

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(self._config.rms_norm_eps))
        return x / scale * self._weights[f"{name}.weight"]

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        size, config = self._config.head_size, self._config
        q, k, v = (x.reshape(len(x), -1, size) for x in (q, k, v))
        if config.qk_norm:
            q, k = self._norm(q, "q_norm"), self._norm(k, "k_norm")
        q, k = self._rotate(q), self._rotate(k)
        age = np.arange(len(q))[:, None] - np.arange(len(k))
        is_seen = (age >= 0) & ((age < self._window) if self._window else True)
        out = np.empty_like(q)
        for head in range(config.num_heads):
            kv = head * config.num_kv_heads // config.num_heads
            scores = np.where(is_seen, q[:, head] @ k[:, kv].T / np.float32(np.sqrt(size)), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights @ v[:, kv] / weights.sum(axis=1, keepdims=True)
        return out.reshape(len(q), -1)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        cosine, sine = (self._rope[: len(x), i, None] for i in range(2))
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _check_finite(layer: int, moments: Moments) -> None:
    for name, total in moments.items():
        if not np.isfinite(total).all():
            raise ModelError(
                f"the inputs of layers.{layer}.{name} are not finite on the calibration text",
                expected="a model whose hidden states float32 can hold",
                hint="leave --calibration out to round to nearest",
            )


def _read_layer(source: Source, layer: int, grains: int) -> dict[str, np.ndarray]:
    names = [spec.name for spec in layer_specs(source.config, layer, grains)]
    return {name.split(".", 2)[2]: _read(source, name) for name in names}


def _read(source: Source, name: str) -> np.ndarray:
    tensor = source_name(name)
    return to_float32(source.read(tensor), source.dtype(tensor))
