"""Loading the weights of a whole job: each unit leaves the store's file system once, and is used as it arrives."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcinfer.comm.library import has_threads
from hpcinfer.errors import RankFailedError
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.arrival import ArrivingStage, prepared_bytes
from hpcinfer.model.delivery import Delivery
from hpcinfer.model.distribution import Portion, distribute, job_of, portions_of
from hpcinfer.model.shard import ShardPlan, shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_parts
from hpcinfer.partition.layout import Layout
from hpcinfer.report.metrics import STAGING, Metrics

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Collectives
    from hpcinfer.weights.reader import Store


class JobLoading:
    """One rank's part of it, once per job: a recovery takes weights from elsewhere (`hpcinfer.model.refill`)."""

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store, self._layout = store, layout
        self._delivery: Delivery | None = None
        self._metrics = Metrics()  # those of `load`, from then on
        self._stage: ArrivingStage | None = None
        self._has_own_thread = False  # the messages are seen to while this rank computes
        self._seconds: dict[str, float | None] = {}  # of the stage, when it is there
        self._start_time = 0.0  # seconds since the epoch
        self._first_token_time: float | None = None  # seconds since the epoch

    def begin(self, world: Collectives, line: MpiGroup | None) -> None:
        """Agree with the others on who reads what.

        Collective over the world. A death raises nothing where there is a line.
        """
        group = line or world.split(0, world.rank)  # messages of loading are apart from all others
        copies = _gather_copies(self._store, world, line) if self._store.has_stage else None
        plans = {
            rank: shard_plan(self._store.config, self._store.grains, mesh, mesh.coord(place))
            for mesh, members in self._layout.replicas
            for place, rank in enumerate(members)
        }
        if group.rank in plans:
            self._start_time = time.time()
            self._delivery = Delivery(self._store, _portions(self._store, plans, group, copies), group)
            self._has_own_thread = group.size == 1 or has_threads()
            if self._has_own_thread:
                self._delivery.start()

    def load(self, kernels: Kernels, metrics: Metrics, plan: ShardPlan, options: LoadOptions) -> ArrivingStage:
        """Let the weights of this rank come; returns at once where the MPI library may be called by several threads.

        Not collective.
        """
        delivery, store = self._delivery, self._store
        assert delivery is not None, f"{plan = }"
        self._metrics = metrics
        self._stage = ArrivingStage(
            lambda: load_parts(delivery, kernels, plan, options), len(plan.layers),
            prepared_bytes(store, store.config, plan), metrics, delivery.start_s,
        )  # fmt: skip
        self._stage.start()
        if not self._has_own_thread:
            delivery.run()
        return self._stage

    def abandon(self) -> None:
        """Pass on what others need of this rank though its replica is not built: a member has died. Not collective."""
        if self._delivery is not None and self._stage is None and self._has_own_thread:
            Thread(target=self._delivery.drain, name="passing weights on", daemon=True).start()

    def finish(self) -> None:
        """Wait until this rank has its weights, unless that fails, and has passed on what others need.

        Not collective, but the others must do the same.
        """
        if self._stage is None or self._delivery is None:
            return
        self._stage.wait()
        if self._stage.is_complete:
            self._delivery.wait()
        with self._metrics.phase(STAGING):
            self._store.flush_stage()
        self._store.close()
        self._seconds = self._stage.seconds()
        self._stage = None

    def note_first_token(self, seconds: float | None) -> None:
        """Say when this rank, as a leader, had its first token, in seconds since the epoch. Not collective."""
        self._first_token_time = self._first_token_time or seconds

    def report(self) -> dict[str, Any]:
        """Say what has moved, and when, as JSON values; seconds count from the beginning. Not collective."""
        if self._delivery is None:
            return {}
        first_token_s = None if self._first_token_time is None else self._first_token_time - self._start_time
        seconds = self._stage.seconds() if self._stage is not None else self._seconds
        return {"began": self._start_time, **dataclasses.asdict(self._delivery.traffic), **seconds,
                "first_token_s": first_token_s}  # fmt: skip


class _Copies:
    """Which ranks have copies of which units on their nodes."""

    def __init__(self, store: Store, bits: Sequence[bytes]) -> None:
        counts = [store.spec(name).shape[0] for name in store.parameters]
        self._first = dict(zip(store.parameters, accumulate(counts, initial=0), strict=False))
        self._bits = [np.unpackbits(np.frombuffer(each, np.uint8)) for each in bits]

    def has(self, rank: int, name: str, unit: int) -> bool:
        """Whether a rank has a copy of a unit."""
        return bool(self._bits[rank][self._first[name] + unit])


def _gather_copies(store: Store, world: Collectives, line: MpiGroup | None) -> _Copies | None:
    """Tell each other what is staged; None if a rank has died meanwhile. Collective over the world."""
    own = [store.has_staged(name, unit) for name in store.parameters for unit in range(store.spec(name).shape[0])]
    bits, is_good = list[bytes](), True
    try:
        bits = world.all_gather_bytes(np.packbits(own).tobytes())
    except RankFailedError:
        is_good = False
        if line is None:
            raise
    if line is not None:
        is_good = line.agree(is_good=is_good)
    return _Copies(store, bits) if is_good else None


def _portions(
    store: Store, plans: Mapping[int, ShardPlan], group: Collectives, copies: _Copies | None
) -> list[Portion]:
    """What this rank reads, receives and sends."""
    nodes = [place.node for place in group.locations] if group.locations else range(group.size)
    job = job_of(store, plans, nodes)
    return portions_of(job, distribute(job, None if copies is None else copies.has), group.rank)
