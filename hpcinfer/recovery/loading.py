"""Loading the weights of a whole job: each unit leaves the store's file system once, and is used as it arrives."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from hpcinfer.agree import on_all
from hpcinfer.comm.library import has_threads
from hpcinfer.comm.waiting import work_meanwhile
from hpcinfer.errors import RankFailedError, RevokedError
from hpcinfer.kernels.protocol import Kernels
from hpcinfer.model.arrival import ArrivingStage, prepared_bytes
from hpcinfer.model.common import Commons, has_commons, open_commons
from hpcinfer.model.delivery import Delivery
from hpcinfer.model.distribution import Job, distribute, job_of
from hpcinfer.model.portions import portions_of
from hpcinfer.model.refill import HeldWeights
from hpcinfer.model.shard import ShardPlan, shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_parts
from hpcinfer.partition.layout import Layout
from hpcinfer.report.metrics import STAGING, WEIGHTS, Metrics

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Collectives, World
    from hpcinfer.weights.reader import Store

log = logging.getLogger(__name__)

T = TypeVar("T")


class JobLoading:
    """One rank's part of it, once per job: a recovery takes weights from elsewhere (`hpcinfer.model.refill`)."""

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store, self._layout = store, layout
        self._group: Collectives | None = None
        self._copies: _Copies | None = None
        self._job: Job | None = None
        self._commons: Commons | None = None
        self._delivery: Delivery | None = None
        self._metrics = Metrics()  # those of `load`, from then on
        self._stage: ArrivingStage | None = None
        self._held: HeldWeights | None = None  # the stage, for whoever gets another place
        self._seconds: dict[str, float | None] = {}  # of the stage, when it is there
        self._start_time = 0.0  # seconds since the epoch
        self._first_token_time: float | None = None  # seconds since the epoch

    def begin(self, world: Collectives, line: MpiGroup | None, *, keeps_table: bool = False) -> None:
        """Tell each other what is staged, and share memory where ranks of a node hold the same.

        Collective over the world; fails on all ranks or on none. A death raises nothing where there is a line.

        Args:
            world: all ranks.
            line: the same where they may die, else None.
            keeps_table: whether the vocabulary table is used as stored (`hpcinfer.model.common`).
        """
        self._start_time = time.time()
        self._group = line or world.split(0, world.rank)  # messages of loading are apart from all others
        if self._store.has_stage:
            self._copies = _agreed(world, line, lambda: _gather_copies(self._store, world))
        self._commons = _agreed(world, line, lambda: self._plan(world, keeps_table=keeps_table))

    def load(self, kernels: Kernels, metrics: Metrics, plan: ShardPlan, options: LoadOptions) -> ArrivingStage:
        """Let the weights of this rank come; returns at once. Not collective."""
        assert self._group is not None, "begin comes first"
        delivery, store = self._make_delivery(self._group), self._store
        self._metrics = metrics
        there = delivery.common_bytes * plan.is_first  # memory that is taken already
        num_bytes = prepared_bytes(store, store.config, plan) + delivery.room_bytes - there
        stage = ArrivingStage(
            lambda: _parts(delivery, kernels, plan, options), len(plan.layers), num_bytes, metrics, delivery.start_s,
        )  # fmt: skip
        self._set_going(delivery)
        stage.start()
        self._stage, self._held = stage, HeldWeights(store.config, kernels, plan, stage)
        return stage

    def watch(self, check: Callable[[], None]) -> None:
        """Have this called by whoever waits for weights: it raises when a rank has died. Not collective."""
        if self._stage is not None:
            self._stage.while_waiting = check

    def abandon(self) -> None:
        """Pass on what others need of this rank though its replica is not built: a member has died. Not collective."""
        group = self._group
        if group is None or self._delivery is not None:
            return
        if any(group.rank in replica.members for replica in self._layout.replicas):
            delivery = self._make_delivery(group)
            delivery.pass_on()
            self._set_going(delivery)

    def held(self) -> HeldWeights | None:
        """What this rank has loaded, and what is still to come; None if that has not begun, or is over."""
        return self._held

    def release(self) -> None:
        """Let go of what this rank has loaded; others still get what they need of it. Not collective."""
        if self._delivery is not None:
            self._delivery.pass_on()
        if self._stage is not None:
            self._seconds = self._stage.seconds()
        self._stage = self._held = None

    def stop(self) -> None:
        """End at once, whatever others wait for: the job has failed. Not collective."""
        if self._delivery is not None:
            self._delivery.stop()
        if self._stage is not None:
            self._stage.wait()

    def finish(self) -> None:
        """Wait until this rank has its weights, unless that fails, and has passed on what others need.

        Not collective, but the others must do the same.
        """
        if self._stage is not None:
            self._stage.wait()
            if self._stage.error is not None and not isinstance(self._stage.error, RevokedError):
                log.warning("weights that were not needed here did not come: %s", self._stage.error)
        if self._delivery is not None:
            while not self._delivery.is_over:
                with self._metrics.phase(WEIGHTS):
                    self._delivery.wait_for_change()
        with self._metrics.phase(STAGING):
            self._store.flush_stage()
        self._store.close()
        self.release()

    def note_first_token(self, seconds: float | None) -> None:
        """Say when this rank, as a leader, had its first token, in seconds since the epoch. Not collective."""
        self._first_token_time = self._first_token_time or seconds

    def report(self) -> dict[str, Any]:
        """Say what has moved, and when, as JSON values; seconds count from the beginning. Not collective."""
        if self._delivery is None:
            return {}
        first_token_s = None if self._first_token_time is None else self._first_token_time - self._start_time
        stage = self._stage  # once: another thread may let go of it
        seconds = stage.seconds() if stage is not None else self._seconds
        return {"began": self._start_time, **dataclasses.asdict(self._delivery.moved), **seconds,
                "first_token_s": first_token_s}  # fmt: skip

    def _plan(self, world: Collectives, *, keeps_table: bool) -> Commons | None:
        """Find out who loads what. Collective over the world."""
        job = self._job = on_all(world, self._make_job)
        if not keeps_table or not has_commons(self._store, job):
            return None
        return open_commons(self._store, job, world)

    def _make_job(self) -> Job:
        store, group = self._store, self._group
        assert group is not None, f"{self._layout = }"
        nodes = [place.node for place in group.locations] if group.locations else range(group.size)
        plans = {
            rank: shard_plan(store.config, store.grains, mesh, mesh.coord(place))
            for mesh, members in self._layout.replicas
            for place, rank in enumerate(members)
        }
        return job_of(store, plans, nodes)

    def _set_going(self, delivery: Delivery) -> None:
        """Have messages seen to by a thread, or by this one whenever it waits."""
        if has_threads():
            delivery.start()
        else:
            work_meanwhile(delivery.turn)
        self._delivery = delivery

    def _make_delivery(self, group: Collectives) -> Delivery:
        """Plan what this rank reads, receives and sends."""
        job, commons = self._job or self._make_job(), self._commons
        self._commons = None  # from now on the memory is the delivery's, and then the stage's
        if commons is not None:
            job = dataclasses.replace(job, common=commons.names)
        runs = distribute(job, None if self._copies is None else self._copies.has)
        arrays = None if commons is None else commons.arrays
        return Delivery(self._store, portions_of(job, runs, group.rank), group, arrays)


class _Copies:
    """Which ranks have copies of which units on their nodes."""

    def __init__(self, store: Store, bits: Sequence[bytes]) -> None:
        counts = [store.spec(name).shape[0] for name in store.parameters]
        self._first = dict(zip(store.parameters, accumulate(counts, initial=0), strict=False))
        self._bits = [np.unpackbits(np.frombuffer(each, np.uint8)) for each in bits]

    def has(self, rank: int, name: str, unit: int) -> bool:
        """Whether a rank has a copy of a unit."""
        return bool(self._bits[rank][self._first[name] + unit])


def _agreed(world: Collectives, line: MpiGroup | None, work: Callable[[], T]) -> T | None:
    """What the world has found out together; None if a rank has died meanwhile: then no other collective works either.

    Collective over the world, as the work is.
    """
    found, error = None, None
    try:
        found = work()
    except RankFailedError:
        if line is None:
            raise
        cast("World", world).revoke()  # where there is a line: nobody waits for this rank any more
    except Exception as caught:  # which the others know of
        error = caught
    is_good = found is not None if line is None else line.agree(is_good=found is not None)
    if error is not None:
        raise error
    return found if is_good else None


def _gather_copies(store: Store, world: Collectives) -> _Copies:
    """Tell each other what is staged. Collective over the world."""
    own = [store.has_staged(name, unit) for name in store.parameters for unit in range(store.spec(name).shape[0])]
    return _Copies(store, world.all_gather_bytes(np.packbits(own).tobytes()))


def _parts(delivery: Delivery, kernels: Kernels, plan: ShardPlan, options: LoadOptions) -> Iterator[Any]:
    """Prepare what comes; if that fails, others still get what they need of this rank."""
    try:
        kernels.bind_workers()
        yield from load_parts(delivery, kernels, plan, options)
    finally:
        delivery.pass_on()
