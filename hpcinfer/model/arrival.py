"""Weights that are used while they arrive: the first layers compute while the last ones are on their way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, overload

from hpcinfer.comm.waiting import is_working_meanwhile, turn_meanwhile
from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import STORAGE
from hpcinfer.kernels.protocol import LayerWeights
from hpcinfer.model.distribution import needed_units
from hpcinfer.model.shard import ShardPlan
from hpcinfer.report.metrics import WEIGHTS, Metrics

if TYPE_CHECKING:
    from hpcinfer.weights.reader import Store

_LOOK_S, _SHORT_S = 0.02, 0.0005


class ArrivingStage:
    """`StageWeights` whose parts come one by one; whoever asks for one that is not there waits for it.

    Args:
        parts: gives the embedding, the layers and the head; called in another thread.
        num_layers: of the stage.
        num_bytes: of memory that all parts take.
        metrics: whose phases tell that a thread waits here, and that it goes on.
        start_s: when loading began, by the monotonic clock.
    """

    def __init__(
        self, parts: Callable[[], Iterator[Any]], num_layers: int, num_bytes: int, metrics: Metrics, start_s: float
    ) -> None:
        self._make, self._num_layers, self._num_bytes, self._metrics = parts, num_layers, num_bytes, metrics
        self._parts: list[Any] = []
        self._change = Condition()
        self._error: BaseException | None = None
        self.while_waiting: Callable[[], None] = lambda: None  # called now and then by whoever waits; may raise
        self._layers: Sequence[LayerWeights] = _Layers(self)
        self._start_s = start_s
        self._thread = Thread(target=self._run, name="loading", daemon=True)
        self._first_layer_s: float | None = None
        self._last_layer_s: float | None = None

    def start(self) -> None:
        """Begin. Not collective."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until all is there, or has failed: then whoever needs what is missing is told. Not collective."""
        self._has_come(self._num_layers + 1)
        self._thread.join()

    @property
    def error(self) -> BaseException | None:
        """Why not all of it comes; None if it does, as far as is known."""
        return self._error

    @property
    def is_complete(self) -> bool:
        """Whether all is there."""
        return len(self._parts) == self._num_layers + 2

    def seconds(self) -> dict[str, float | None]:
        """When the first and the last layer were ready to compute, since the beginning; None until then."""
        return {"first_layer_s": self._first_layer_s, "last_layer_s": self._last_layer_s}

    @property
    def embed(self) -> Any | None:
        """The vocabulary table."""
        return self.part(0)

    @property
    def layers(self) -> Sequence[LayerWeights]:
        """The layers; each is waited for when it is asked for."""
        return self._layers

    @property
    def head(self) -> Any | None:
        """Last norm and output head."""
        return self.part(self._num_layers + 1)

    @property
    def num_layers(self) -> int:
        """Layers of the stage, whether they are there or not."""
        return self._num_layers

    @property
    def bytes_to_come(self) -> int:
        """Memory that the parts which are not there will take, about."""
        num_parts = self._num_layers + 2
        return self._num_bytes * (num_parts - len(self._parts)) // num_parts

    def part(self, index: int) -> Any:
        """Wait for a part: 0 the embedding, then the layers, then the head. Not collective."""
        if not self._has_come(index):
            assert self._error is not None, f"{index = } {len(self._parts) = }"
            raise self._error
        return self._parts[index]

    def _has_come(self, index: int) -> bool:
        """Wait for a part, in a phase for each that comes: the watchdog sees progress. False if it has failed."""
        while len(self._parts) <= index and self._error is None:
            with self._metrics.phase(WEIGHTS):
                self._wait_for_next(len(self._parts))
        return len(self._parts) > index

    def _wait_for_next(self, seen: int) -> None:
        while len(self._parts) == seen and self._error is None:
            with self._change:
                look_s = _SHORT_S if is_working_meanwhile() else _LOOK_S
                self._change.wait_for(lambda: len(self._parts) > seen or self._error is not None, look_s)
            turn_meanwhile()
            self.while_waiting()

    def _run(self) -> None:
        try:
            for part in self._make():
                self._take(part)
        except BaseException as error:
            self._error = error
        with self._change:
            self._change.notify_all()

    def _take(self, part: Any) -> None:
        with self._change:
            self._parts.append(part)
            self._change.notify_all()
        seconds = time.monotonic() - self._start_s
        if len(self._parts) == 2:
            self._first_layer_s = seconds
        if self.is_complete:
            self._last_layer_s = seconds
            self._layers = tuple(self._parts[1:-1])


class _Layers(Sequence[LayerWeights]):
    """The layers of a stage, as far as they are asked for."""

    def __init__(self, stage: ArrivingStage) -> None:
        self._stage = stage

    def __len__(self) -> int:
        return self._stage.num_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        layer: LayerWeights = self._stage.part(1 + range(len(self))[index])
        return layer

    def __iter__(self) -> Iterator[LayerWeights]:
        for place in range(len(self)):  # the inherited one takes an IndexError of a layer for the end
            yield self[place]


def prepared_bytes(store: Store, config: ModelConfig, plan: ShardPlan) -> int:
    """Estimate the memory of a rank's prepared weights: float32, but tables and quantised weights as stored.

    Not collective.
    """
    total = 0
    for name, param in store.parameters.items():
        spec = store.spec(name)
        count = len(needed_units(config, plan, spec)) * math.prod(spec.shape[1:])
        stored = count * STORAGE[param.dtype].itemsize
        is_as_stored = param.dtype in ("int8", "int4") or name.endswith("_scale")
        prepared = stored if is_as_stored else 4 * count
        is_table = name.startswith("embed_tokens.")
        total += stored * (is_table and plan.is_first)
        total += prepared * (not is_table or (plan.is_last and config.tie_word_embeddings))
    return total
