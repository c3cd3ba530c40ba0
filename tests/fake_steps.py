"""A world for the supervisor's loop without processes: steps, a job directory, a scheduler that do as they are told."""

from collections.abc import Iterable, Sequence

from hpcinfer.supervision.base import Burial, Outcome, Rules
from hpcinfer.supervision.loop import Supervisor
from hpcinfer.supervision.nodes import Node, Placement, Roster


class FakeStep:
    """A step; a test sets how it ends."""

    def __init__(self, name: str, placement: Placement, opens_retry: bool) -> None:
        self.name, self.nodes, self.opens_retry = name, [seat.node for seat in placement], opens_retry
        self.code: int | None = None
        self.calls: list[str] = []

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.calls.append("stop")

    def end(self) -> None:
        self.calls.append("end")

    def bury(self) -> None:
        self.calls.append("bury")


class FakeWatch:
    """A job directory."""

    def __init__(self) -> None:
        self.open = self.complete = False
        self.silent: set[str] = set()
        self.in_flight: dict[str, int] = {}
        self.by_rows: set[str] = set()  # steps that a row alone will have crashed
        self.finished: dict[str, int] = {}  # by step: rows that it will turn out to have finished
        self.buried: list[tuple[str, int, bool]] = []

    def is_open(self) -> bool:
        return self.open

    def is_complete(self) -> bool:
        return self.complete

    def is_silent(self, step: str) -> bool:
        return step in self.silent

    def num_in_flight(self, step: str) -> int | None:
        return self.in_flight.get(step)

    def bury(self, step: str, exit_code: int, *, is_node_lost: bool) -> Burial:
        self.buried.append((step, exit_code, is_node_lost))
        return Burial(self.finished.get(step, 0), step in self.by_rows)


class FakeCluster:
    """A scheduler."""

    def __init__(self) -> None:
        self.dead: set[str] = set()
        self.kept: list[str] | None = None
        self.num_refusals = 0  # that are still to come
        self.num_questions = 0

    def down(self, names: Sequence[str]) -> set[str]:
        self.num_questions += 1
        return self.dead & set(names)

    def shrink(self, kept: Iterable[str]) -> bool:
        self.num_refusals -= 1
        if self.num_refusals < 0:
            self.kept = list(kept)
        return self.num_refusals < 0


class Scene:
    """A supervisor among fakes, and a clock that the test moves."""

    def __init__(self, num_replicas: int = 2, nodes: Sequence[Node] = (Node("a", 1), Node("b", 1)), ranks: int = 1,
                 restarts: int = 3, is_open: bool = True, **more: object) -> None:
        self.watch, self.cluster, self.steps, self.reason = FakeWatch(), FakeCluster(), [], None
        self.watch.open = is_open
        self.now, self.broken_launchers, self.is_over = 100.0, 0, False
        rules = Rules(num_replicas, ranks, restarts, backoff_s=1.0, grace_s=10.0, **more)
        self.supervisor = Supervisor(rules, Roster(nodes), self.watch, self._start, name="s", cluster=self.cluster,
                                     told_to_stop=lambda: self.reason)

    def _start(self, name: str, placement: Placement, opens_retry: bool) -> FakeStep:
        if self.broken_launchers:
            self.broken_launchers -= 1
            raise OSError("no such launcher")
        self.steps.append(FakeStep(name, placement, opens_retry))
        return self.steps[-1]

    @property
    def running(self) -> list[FakeStep]:
        return [step for step in self.steps if step.code is None]

    def turn(self, seconds: float = 0.0) -> "Scene":
        """Let time pass, as often as the loop would look."""
        for _ in range(max(1, round(seconds))):
            self.now += min(seconds, 1.0)
            self.is_over = self.supervisor.turn(self.now)
        return self

    def die(self, step: FakeStep, code: int = 137, finished: int = 0, seconds: float = 100.0) -> None:
        """End a step, and give the supervisor time to react."""
        step.code, self.watch.finished[step.name] = code, finished
        self.turn(seconds)

    @property
    def outcome(self) -> Outcome | None:
        return self.supervisor._outcome
